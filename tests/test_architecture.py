"""The floors: imports point down only, Triton stays in one folder, files stay short."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 400

# the longest prefix of a module's name counts; a module imports from its own floor or from below
FLOORS = {
    "fastgpt2.kernels.reference": 0,
    "fastgpt2.kernels.checks": 0,
    "fastgpt2.kernels.backend": 0,
    "fastgpt2.kernels.modes": 0,
    "fastgpt2.kernels.philox": 0,
    "fastgpt2.kernels.dropout_bits": 0,
    "fastgpt2.kernels.gpus": 0,
    "fastgpt2.kernels.tuning": 0,
    "fastgpt2.kernels.cases": 0,
    "fastgpt2.kernels.machine_code": 0,
    "fastgpt2.kernels.jit": 1,
    "fastgpt2.kernels.cpu": 1,
    "fastgpt2.kernels": 2,
    "fastgpt2.config": 3,
    "fastgpt2.layers": 3,
    "fastgpt2.transformer": 3,
    "fastgpt2.plain": 3,
    "fastgpt2.quantize": 3,
    "fastgpt2.lora": 3,
    "fastgpt2.precision": 3,
    "fastgpt2.state_dict": 3,
    "fastgpt2.explanation": 3,
    "fastgpt2.cache": 3,
    "fastgpt2.generative": 3,
    "fastgpt2.early": 3,
    "fastgpt2.errors": 3,
    "fastgpt2.units": 3,
    "fastgpt2.cli": 3,
    "fastgpt2.compiler": 3,
    "fastgpt2.devices": 3,
    "fastgpt2.files": 3,
    "fastgpt2.picture": 3,
    "fastgpt2.streams": 3,
    "fastgpt2.download": 3,
    "fastgpt2.model": 4,
    "fastgpt2.text": 5,
    "fastgpt2.weights": 5,
    "fastgpt2.distributed": 5,
    "fastgpt2.peers": 5,
    "fastgpt2.runs": 5,
    "fastgpt2.opener": 5,
    "fastgpt2.train": 6,
    "fastgpt2.generate": 6,
    "fastgpt2.evaluate": 6,
    "fastgpt2.integrations": 6,
    # a road of its own: it may show anything, and nothing stands on it
    "fastgpt2.ladder": 6,
    # the commands, and the package's public names
    "fastgpt2": 7,
    "fastgpt2.kernels.report": 7,
    "fastgpt2.kernels.warm": 7,
    "fastgpt2.train.__main__": 7,
    "fastgpt2.generate.__main__": 7,
    "fastgpt2.evaluate.__main__": 7,
    "fastgpt2.ladder.__main__": 7,
}
# nanoGPT has from_pretrained and generate on the class, so the class reaches for the readers and
# for the generator when they are called
ALLOWED_UP = {
    ("fastgpt2.model", "fastgpt2.weights"),
    ("fastgpt2.generative", "fastgpt2.generate.batch"),
}


def python_files(*folders: str) -> list[Path]:
    # fastgpt2/kernels is a link to kernels/, and rglob does not follow links
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = ("fastgpt2", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PACKAGE = {module_name(path): path for path in python_files("fastgpt2", "kernels")}


def floor(module: str) -> int:
    while module not in FLOORS:
        module = module.rpartition(".")[0]
    return FLOORS[module]


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file; walking a tree takes longer than what a test does with its nodes."""
    return tuple(ast.walk(parse(path)))


def imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Every module that is imported, anywhere in the file."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from ((node, name if name in PACKAGE else node.module) for name in names)


def test_every_module_has_a_file_and_a_floor() -> None:
    # the tests below would pass on an empty list
    assert {"fastgpt2.model", "fastgpt2.kernels.jit.layer_norm", "fastgpt2.train.__main__"} <= set(
        PACKAGE
    )
    assert floor("fastgpt2.kernels.jit.layer_norm") == 1
    assert floor("fastgpt2.train.__main__") == 7


def test_imports_point_down() -> None:
    upward = [
        f"{module} (floor {floor(module)}) imports {imported} (floor {floor(imported)})"
        for module, path in PACKAGE.items()
        for _, imported in imports(path)
        if imported.split(".")[0] == "fastgpt2"
        and floor(imported) > floor(module)
        and (module, imported) not in ALLOWED_UP
        # a package's __init__ may name its public classes for type checkers
        and path.name != "__init__.py"
    ]
    assert not upward, "\n".join(upward)


def test_no_import_cycles() -> None:
    """Among the imports that run with the module; those inside functions come later."""
    graph: dict[str, set[str]] = {}
    for module, path in PACKAGE.items():
        at_once = set(parse(path).body)
        found = {imported for node, imported in imports(path) if node in at_once}
        graph[module] = (found & set(PACKAGE)) - {module}
    assert "fastgpt2.layers" in graph["fastgpt2.model"]
    assert "fastgpt2.weights" not in graph["fastgpt2.model"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_triton_is_imported_under_jit_only() -> None:
    guilty = [
        module
        for module, path in PACKAGE.items()
        for _, imported in imports(path)
        if imported.split(".")[0] == "triton" and not module.startswith("fastgpt2.kernels.jit")
    ]
    assert not guilty


def test_pictures_are_drawn_in_one_place() -> None:
    """``fastgpt2.picture`` knows what a notebook's backend or a matplotlibrc can do to them."""
    guilty = {
        path.relative_to(ROOT).as_posix()
        for path in python_files("fastgpt2", "kernels", "benchmarks", "tools")
        for _, imported in imports(path)
        if imported.split(".")[0] == "matplotlib"
    }
    # the function of the book shows its picture in a reader's notebook
    assert guilty == {"fastgpt2/picture.py", "fastgpt2/ladder/training.py"}


def test_imports_are_absolute() -> None:
    for path in python_files("fastgpt2", "kernels", "tests", "benchmarks", "tools"):
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: relative import"


def test_files_are_short() -> None:
    python = python_files("fastgpt2", "kernels", "tests", "benchmarks", "tools")
    for path in (*python, *(ROOT / "kernels" / "cpu").glob("*.[ch]*")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines"


def names_its_encoding(call: ast.Call) -> bool:
    """False for ``open(path)`` and ``path.open()``, ``.read_text()`` and ``.write_text(text)``."""
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return True
    function, texts = call.func, [k.value for k in call.keywords if k.arg == "mode"]
    if isinstance(function, ast.Name) and function.id == "open":
        texts += call.args[1:]
    elif isinstance(function, ast.Attribute) and function.attr in ("read_text", "write_text"):
        # or without its name, after the text
        return len(call.args) > (function.attr == "write_text")
    elif isinstance(function, ast.Attribute) and function.attr == "open":
        texts += call.args
        if texts and not isinstance(texts[0], ast.Constant):
            # the open of something else, os or a class of ours, which takes what is to be opened
            return True
    else:
        return True
    return any(isinstance(text, ast.Constant) and "b" in str(text.value) for text in texts)


@pytest.mark.parametrize(
    ("code", "fine"),
    [
        ("open(p)", False),
        ("p.open('w')", False),
        ("p.read_text()", False),
        ("p.write_text(t)", False),
        ("open(p, 'rb')", True),
        ("p.open(mode='ab')", True),
        ("open(p, encoding='utf-8')", True),
        ("p.read_text(encoding='utf-8')", True),
        ("p.read_text('utf-8')", True),
        ("write_text(p, t)", True),
        ("os.open(p, flags)", True),
    ],
)
def test_the_rule_about_encodings(code: str, fine: bool) -> None:
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call)
    assert names_its_encoding(call) is fine


def test_text_files_are_opened_with_an_encoding() -> None:
    for path in python_files("fastgpt2", "kernels", "tests", "benchmarks", "tools"):
        for node in nodes(path):
            if isinstance(node, ast.Call):
                assert names_its_encoding(node), f"{path.relative_to(ROOT)}:{node.lineno}"


def test_importing_the_package_is_light() -> None:
    """No GPU library, no other framework, no plotting; and no word on the terminal."""
    code = (
        "import sys, fastgpt2, fastgpt2.kernels\n"
        "from fastgpt2 import GPT, GPTConfig\n"
        "GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=9, block_size=4))\n"
        "heavy = {'triton', 'transformers', 'tensorflow', 'matplotlib', 'huggingface_hub'}\n"
        "sys.exit(str(heavy & {name.split('.')[0] for name in sys.modules} or ''))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (result.stdout, result.stderr.strip()) == ("", "")


def functions_that_compile(tree: ast.Module) -> set[str]:
    """Those of a test file that come to ``run_compiling``, also by fixtures and helpers."""
    uses = {
        function.name: {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        | {argument.arg for argument in function.args.args}
        # usefixtures("...")
        | {str(node.value) for node in ast.walk(function) if isinstance(node, ast.Constant)}
        for function in tree.body
        if isinstance(function, ast.FunctionDef)
    }
    found = {"run_compiling"}
    while more := {name for name, used in uses.items() if used & found} - found:
        found |= more
    return found


def test_a_tests_name_says_whether_it_compiles() -> None:
    """``binary`` or ``binaries`` in its name: compiled for a GPU. All others interpret kernels."""
    names = set()
    for path in python_files("tests/kernels", "tests/tools"):
        compiling = functions_that_compile(parse(path))
        for function in parse(path).body:
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                place = f"{path.relative_to(ROOT)}: {function.name}"
                assert ("binar" in function.name) == (function.name in compiling), place
                names |= {function.name} & compiling
    assert len(names) > 5


def test_whether_kernels_are_interpreted_is_decided_in_few_places() -> None:
    """A test that compiles without ``run_compiling`` has to speak of the variable."""
    speaking = {
        str(path.relative_to(ROOT / "tests"))
        for path in python_files("tests")
        if f'"{"TRITON"}_INTERPRET"' in path.read_text(encoding="utf-8")
    }
    assert speaking == {
        "benchmarks/dry.py",
        "compiling.py",
        "conftest.py",
        "kernels/budget.py",
        "kernels/test_report.py",
        "tools/test_saved_whole.py",
    }
