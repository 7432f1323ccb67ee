"""What must never be written in a kernel, read from the source: each rule has bitten someone."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

JIT = Path(__file__).resolve().parents[2] / "kernels" / "jit"
MODULES = sorted(JIT.glob("*.py"))
MAX_PARAMETERS, MAX_LINES = 14, 60


def _is_tl(node: ast.AST, *names: str) -> bool:
    """Whether the node is a call of ``tl.<name>``."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in names
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "tl"
    )


def _keywords(call: ast.Call) -> dict[str | None, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords}


def _kernels(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """The functions under ``@triton.jit``, kernels and helpers alike."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(
            "triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list
        ):
            yield node


def forbidden_names(tree: ast.AST) -> Iterator[ast.AST]:
    """Block pointers are deprecated, warp specialisation is ignored or fails, users never autotune.

    Floating-point atomics add in any order: two-stage reductions instead.
    """
    names = {"make_block_ptr", "advance", "warp_specialize", "autotune", "heuristics"}
    for node in ast.walk(tree):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "arg", None)
        if name in names or (isinstance(name, str) and name.startswith("atomic_")):
            yield node


def transposed_accumulators(tree: ast.AST) -> Iterator[ast.AST]:
    """``tl.dot(tl.trans(acc), x)`` gave wrong gradients on Hopper (Triton 3.4 to 3.7.0)."""
    for function in _kernels(tree):
        transposed = {
            target.id
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and _transposes(node.value)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(function):
            if _is_tl(node, "dot") and isinstance(node, ast.Call):
                first = node.args[0]
                if _transposes(first) or (isinstance(first, ast.Name) and first.id in transposed):
                    yield node


def _transposes(node: ast.AST) -> bool:
    return any(
        _is_tl(part, "trans", "permute") or (isinstance(part, ast.Attribute) and part.attr == "T")
        for part in ast.walk(node)
    )


def short_program_ids(tree: ast.AST) -> Iterator[ast.AST]:
    """A program id becomes int64 at once: B*T*V is beyond 2^31 at GPT-2's own shapes."""
    cast = {
        node.func.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "to"
        and [ast.unparse(argument) for argument in node.args] == ["tl.int64"]
    }
    for node in ast.walk(tree):
        if _is_tl(node, "program_id") and node not in cast:
            yield node


def infinite_masks(tree: ast.AST) -> Iterator[ast.AST]:
    """A row of -inf alone gives exp(-inf minus -inf): before an exponential, masks are finite."""
    if not any(_is_tl(node, "exp", "exp2") for node in ast.walk(tree)):
        return
    for node in ast.walk(tree):
        text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        named = isinstance(node, ast.Attribute) and node.attr == "inf"
        if named or (text and node.value.strip("+-").lower() in ("inf", "infinity")):  # type: ignore[attr-defined]
            yield node


def loads_without_other(tree: ast.AST) -> Iterator[ast.AST]:
    """What a masked load returns outside its mask is undefined without ``other=``."""
    for node in ast.walk(tree):
        if _is_tl(node, "load") and isinstance(node, ast.Call):
            given = _keywords(node)
            masked = "mask" in given or len(node.args) > 1
            if masked and "other" not in given and len(node.args) < 3:
                yield node


def constant_strides(tree: ast.AST) -> Iterator[ast.AST]:
    """A stride as constexpr causes a compilation for every shape."""
    for function in _kernels(tree):
        for argument in function.args.args:
            annotation = ast.unparse(argument.annotation) if argument.annotation else ""
            if "stride" in argument.arg and "constexpr" in annotation:
                yield argument


def oversized_kernels(tree: ast.AST) -> Iterator[ast.AST]:
    """At most 14 parameters and 60 lines, else a helper is missing."""
    for function in _kernels(tree):
        lines = (function.end_lineno or 0) - function.lineno + 1
        if len(function.args.args) > MAX_PARAMETERS or lines > MAX_LINES:
            yield function


def reserved_parameters(tree: ast.AST) -> Iterator[ast.AST]:
    """The launcher has arguments of its own: a kernel with one of those names fails on a GPU."""
    reserved = {"options", "grid", "warmup", "num_warps", "num_stages", "num_ctas"}
    for function in _kernels(tree):
        yield from (a for a in function.args.args if a.arg in reserved)


def unguarded_launches(tree: ast.AST) -> Iterator[ast.AST]:
    """Triton launches on the current GPU: only these two select that of the tensors."""
    guarded = {
        part
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        and function.name in ("launch_kernel", "compile_noted")
        for part in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node not in guarded:
            subscribed = isinstance(node.func, ast.Subscript)
            method = isinstance(node.func, ast.Attribute) and node.func.attr in ("run", "warmup")
            if subscribed or (method and "kernel" in ast.unparse(node.func)):
                yield node


RULES: dict[Callable[[ast.AST], Iterator[ast.AST]], str] = {
    forbidden_names: "tl.atomic_add(x_ptr + offs, x)",
    transposed_accumulators: "@triton.jit\ndef f(s, v):\n    p = tl.trans(s)\n    tl.dot(p, v)",
    short_program_ids: "row = tl.program_id(0) * BLOCK",
    infinite_masks: "s = tl.where(visible, s, float('-inf'))\np = tl.exp2(s - m)",
    loads_without_other: "x = tl.load(x_ptr + offs, mask=offs < n)",
    constant_strides: "@triton.jit\ndef f(x_strides: tl.constexpr):\n    pass",
    reserved_parameters: "@triton.jit\ndef f(x_ptr, options):\n    pass",
    unguarded_launches: "_gelu_fwd_kernel[grid](x, y)",
    oversized_kernels: "@triton.jit\ndef f(a,b,c,d,e,f,g,h,i,j,k,l,m,n,o):\n    pass",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_kernels_obey(path: Path, rule: Callable[[ast.AST], Iterator[ast.AST]]) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [f"{path.name}:{getattr(node, 'lineno', '?')}" for node in rule(tree)]
    assert not found, f"{rule.__doc__}\n" + "\n".join(found)


@pytest.mark.parametrize(("rule", "bad"), RULES.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_rules_find_what_they_forbid(
    rule: Callable[[ast.AST], Iterator[ast.AST]], bad: str
) -> None:
    assert list(rule(ast.parse(bad)))


@pytest.mark.parametrize(
    "good",
    [
        "s = tl.dot(k, tl.trans(q))",
        "row = tl.program_id(0).to(tl.int64) * BLOCK",
        "x = tl.load(x_ptr + offs, mask=mask, other=0.0)",
        "x = tl.load(x_ptr)",
        "launch_kernel(_gelu_fwd_kernel, grid, x, y)",
        "s = tl.where(visible, s, MASKED)\np = tl.exp2(s - m)",
        "largest = tl.max(tl.where(known, x, float('-inf')), 0)",
        "@triton.jit\ndef f(x_strides, BLOCK: tl.constexpr):\n    pass",
    ],
)
def test_rules_allow_what_is_right(good: str) -> None:
    assert not [rule.__name__ for rule in RULES if list(rule(ast.parse(good)))]
