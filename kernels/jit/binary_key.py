"""What a compiled binary depends on, as one hash: equal keys, equal binaries.

A key covers the kernel's source and that of every jit function and global that it uses, types,
constants and options of the case, the GPU, the compilers, and the code that reads the binary.
Source counts as code: comments, docstrings, and the lines that it stands on do not change a key.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler.compiler import make_backend

from fastgpt2.kernels import machine_code
from fastgpt2.kernels.cases import CompileCase
from fastgpt2.kernels.jit import compile as offline
from fastgpt2.kernels.jit.launch import COMPILER_OPTIONS

# fields that do not affect the binary: its names, and the work that it is judged by
_BESIDE = {"kernel", "name", "config", "wants_mma", "flops", "bytes", "work", "per_sm"}
# modules that the versions of Triton and Python stand for
_KNOWN_MODULES = ("triton", "math")


def normal_form(source: str) -> str:
    """The code as Python prints it: without comments, docstrings and the author's line breaks."""
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        documented = ast.Module, ast.ClassDef, ast.FunctionDef
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _is_known(module: str) -> bool:
    return module.split(".")[0] in _KNOWN_MODULES


def _gather(name: str, value: Any, found: dict[str, str]) -> None:
    """Add to ``found``, under ``name``, what ``value`` says, and all that it uses."""
    function = getattr(value, "fn", value)
    if isinstance(value, ModuleType):
        # the attributes of a module of ours would escape
        assert _is_known(value.__name__), f"a kernel uses the module {value.__name__}: import names"
    elif inspect.isfunction(function):
        place = f"{function.__module__}.{function.__qualname__}"
        if not _is_known(function.__module__) and place not in found:
            defaults = f"{function.__defaults__} {function.__kwdefaults__}"
            found[place] = f"{normal_form(inspect.getsource(function))} {defaults}"
            used = inspect.getclosurevars(function)
            for inner, other in (used.globals | used.nonlocals).items():
                _gather(f"{place}: {inner}", other, found)
    else:
        found[name] = repr(value)
        assert " at 0x" not in found[name], (
            f"a kernel uses {found[name]}, which has no lasting name"
        )


@lru_cache
def sources(kernel: Callable[..., Any]) -> str:
    """The normal form of a kernel and of every function and constant that it uses, at any depth."""
    found: dict[str, str] = {}
    _gather("", kernel, found)
    return "\n".join(f"{name} = {text}" for name, text in sorted(found.items()))


@lru_cache
def _reader() -> str:
    """The code that compiles a case and reads what it became."""
    files = [Path(module.__file__ or "") for module in (offline, machine_code)]
    return "\n".join(normal_form(file.read_text(encoding="utf-8")) for file in files)


@lru_cache
def _compilers(arch: str) -> str:
    """Triton and the assembler by version, and what the environment tells them."""
    target = offline.TARGETS[arch]
    return f"{offline.TRITON_VERSION} {target} {make_backend(target).hash()} " + str(
        sorted(get_cache_invalidating_env_vars().items())
    )


def binary_key(case: CompileCase, arch: str) -> str:
    """16 hexadecimal digits of the SHA-256 of all that the binary of ``case`` depends on.

    Args:
        case: the kernel with its types, constants and options.
        arch: one of ``TARGETS``, such as ``sm_90``.
    """
    fields = sorted(set(case.__dataclass_fields__) - _BESIDE)
    parts = (
        sources(case.kernel),
        *(f"{name} = {getattr(case, name)}" for name in fields),
        f"{COMPILER_OPTIONS}",
        _compilers(arch),
        _reader(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
