"""The package installs, and is found, in every way people use it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
SITE_PACKAGES = sysconfig.get_paths()["purelib"]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed, without our own PYTHONPATH."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources, so that building leaves nothing in the working tree."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    leave_out = shutil.ignore_patterns("__pycache__")
    for name in ("fastgpt2", "kernels"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=leave_out)
    return copy


WHERE = "import fastgpt2.kernels as k, fastgpt2 as f; print(f.__file__); print(k.__file__)"


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    expected = {
        ".".join(Path(folder).relative_to(ROOT).parts)
        for folder, _, names in os.walk(ROOT / "fastgpt2", followlinks=True)
        if "__init__.py" in names
    }
    assert set(listed["tool"]["setuptools"]["packages"]) == expected


def test_bare_checkout(checkout: Path) -> None:
    found = run(sys.executable, "-c", WHERE, cwd=checkout, PYTHONPATH=str(checkout))
    assert [Path(line).relative_to(checkout) for line in found.splitlines()] == [
        Path("fastgpt2/__init__.py"),
        Path("fastgpt2/kernels/__init__.py"),
    ]


def test_wheel_in_an_empty_environment(checkout: Path, tmp_path: Path) -> None:
    """Only the third-party packages come from outside; fastgpt2 comes from the wheel."""
    run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        tmp_path,
        checkout,
        cwd=tmp_path,
    )
    (wheel,) = tmp_path.glob("*.whl")
    environment = tmp_path / "environment"
    # our own pip installs into it: to give it one takes seconds
    venv.create(environment)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    found = run(python, "-c", WHERE, cwd=tmp_path, PYTHONPATH=SITE_PACKAGES)
    for line in found.splitlines():
        assert Path(line).is_relative_to(environment)
    command = environment / "bin" / "fastgpt2"
    assert "train" in run(command, "--help", cwd=tmp_path, PYTHONPATH=SITE_PACKAGES)
    assert "shakespeare-char" in run(
        command, "train", "--help", cwd=tmp_path, PYTHONPATH=SITE_PACKAGES
    )
    # no top-level `kernels`: that name is Hugging Face's
    installed = next(environment.glob("lib/python*/site-packages"))
    assert (installed / "fastgpt2" / "py.typed").is_file()
    assert not (installed / "kernels").exists()
    # what is compiled where it runs
    code = {path.name for path in (ROOT / "kernels" / "cpu").glob("*.[ch]*")}
    assert "products.h" in code
    assert {path.name for path in (installed / "fastgpt2/kernels/cpu").glob("*.[ch]*")} == code


@pytest.fixture
def without_links(checkout: Path) -> Path:
    """A checkout as git makes it on Windows: the link is a text file that holds its target."""
    link = checkout / "fastgpt2" / "kernels"
    link.unlink()
    link.write_text("../kernels", encoding="utf-8")
    return checkout


def test_an_editable_install_needs_no_link(without_links: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", *options)
    run(*pip, "-e", without_links, cwd=tmp_path, PYTHONPATH=SITE_PACKAGES)
    installed = next(environment.glob("lib/python*/site-packages"))
    # its own finder first: the outer environment may have one of the same name
    path = f"{installed}{os.pathsep}{SITE_PACKAGES}"
    found = run(python, "-c", WHERE, cwd=tmp_path, PYTHONPATH=path)
    assert [Path(line).parent.relative_to(without_links) for line in found.splitlines()] == [
        Path("fastgpt2"),
        Path("kernels"),
    ]


def test_a_wheel_needs_no_link(without_links: Path, tmp_path: Path) -> None:
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path)
    run(*build, without_links, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {f"fastgpt2/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    assert modules <= names
    assert "fastgpt2/kernels" not in names


def test_this_installation_finds_the_kernels_from_anywhere(tmp_path: Path) -> None:
    """Editable or not, from a folder that is not the checkout."""
    look = "from importlib.util import find_spec; print(find_spec('fastgpt2') is not None)"
    if run(sys.executable, "-c", look, cwd=tmp_path) != "True":
        pytest.skip("fastgpt2 is not installed in this environment (run from a checkout)")
    first, second = run(sys.executable, "-c", WHERE, cwd=tmp_path).splitlines()
    assert Path(second).resolve().parent == ROOT / "kernels"
    assert Path(first).resolve().parent == ROOT / "fastgpt2"


def test_type_checkers_see_through_the_mapping(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text("from fastgpt2.kernels import gelu\nreveal_type(gelu)\n", encoding="utf-8")
    # everything else is left out: reading PyTorch takes a minute, the rest of ours another
    config = tmp_path / "mypy.ini"
    seen = ("fastgpt2", "fastgpt2.kernels", "fastgpt2.kernels.gelu")
    sections = [f"[mypy-{name}]\nfollow_imports = silent\n" for name in seen]
    config.write_text("".join(["[mypy]\nfollow_imports = skip\n", *sections]), encoding="utf-8")
    found = run(
        *(sys.executable, "-m", "mypy", "--config-file", config, "--cache-dir", tmp_path / "c"),
        program,
        cwd=tmp_path,
        MYPYPATH=str(ROOT),
    )
    assert 'Revealed type is "def (x: Any, *, form: str =, impl: str =) -> Any"' in found.replace(
        "builtins.", ""
    )


def test_transformers_is_unharmed_from_the_root() -> None:
    """From here ``import kernels`` finds our folder, and transformers probes for that name."""
    pytest.importorskip("transformers")
    program = (
        "import sys; sys.path.insert(0, '.');"
        "from transformers import GPT2Config, GPT2LMHeadModel;"
        "import torch;"
        "c = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8);"
        "print(GPT2LMHeadModel(c)(torch.tensor([[1, 2]])).logits.shape)"
    )
    assert run(sys.executable, "-c", program, cwd=ROOT) == "torch.Size([1, 2, 11])"
