"""Compile a C++ file of this folder for the processor that it runs on, once, and load it."""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

# an expression's product and sum may become one instruction; nothing else is left to the compiler:
# the code says in which order it adds
_FLAGS = (
    *("-std=c++17", "-O2", "-march=native", "-ffp-contract=fast"),
    *("-shared", "-fPIC", "-pthread"),
)


def source(name: str) -> Path:
    """The C++ file of this name in this folder."""
    return Path(__file__).with_name(f"{name}.cpp")


def library_path(name: str, compiler: str, folder: Path) -> Path:
    """Where the library of a C++ file is, or will be: another processor has another one.

    Args:
        name: of the C++ file.
        compiler: as g++ or clang++.
        folder: of all libraries.

    Raises:
        OSError: the compiler cannot be started, or fails.
    """
    # the compiler's version and the processor's instructions
    macros = _run([compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    digest = hashlib.sha256()
    # headers are few: any of them may be included
    sources = (source(name), *sorted(source(name).parent.glob("*.h")))
    code = [path.read_bytes() for path in sources]
    for part in (*code, " ".join(_FLAGS).encode(), macros):
        digest.update(hashlib.sha256(part).digest())
    return folder / f"{name}-{digest.hexdigest()[:16]}.so"


def load(name: str, compiler: str, path: Path) -> ctypes.CDLL:
    """The library of a C++ file, compiled if it has not been.

    Args:
        name: of the C++ file.
        compiler: as g++ or clang++.
        path: ``library_path``'s; where it cannot be written, the library is kept in memory alone.

    Raises:
        OSError: it cannot be compiled or loaded.
    """
    if path.exists():
        return ctypes.CDLL(str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{name}-")
    except OSError:
        made = tempfile.TemporaryDirectory(prefix=f"{name}-")
    with made as folder:
        library = _compile(name, compiler, Path(folder))
        # a loaded library outlives its file
        loaded = ctypes.CDLL(str(library))
        # whole, or not there: several processes may compile at once
        with suppress(OSError):
            os.replace(library, path)
        return loaded


def _compile(name: str, compiler: str, folder: Path) -> Path:
    path = folder / f"{name}.so"
    _run([compiler, *_FLAGS, str(source(name)), "-o", str(path)])
    return path


def _run(command: list[str]) -> bytes:
    """What a program writes.

    Raises:
        OSError: it cannot be started, or fails.
    """
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        errors = [line for line in said if "error" in line] or said
        raise OSError(f"{command[0]}: {errors[0] if errors else f'status {done.returncode}'}")
    return done.stdout
