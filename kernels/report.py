"""``python -m fastgpt2.kernels.report``: what every kernel needs, on GPUs that are not there.

Compiles each kernel in each of its configurations for each architecture and reads the binaries:
registers, spills, shared memory, tensor-core instructions, and what the inner loop's instructions
are. Prints a table with blocks resident and times of a stated model, and writes it to
``kernels/REPORT.md``. ``--check`` compares with the committed expectation instead and fails on a
spill, on shared memory that no block can have, on lost tensor-core instructions, on 5 % more
instructions, and on a launch that gives a multiprocessor more blocks than fit: exit code 1. Another
compiler makes other binaries, so each Triton has an expectation of its own,
``expectation-VERSION.json`` by ``--update``, with ``--arch`` of those architectures alone; without
one there is nothing to compare with: exit code 2. Results are cached by source, so that a second
run takes seconds.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from fastgpt2 import cli
from fastgpt2.errors import UserError
from fastgpt2.files import write_text
from fastgpt2.kernels.gpus import ARCHITECTURES, GPUS
from fastgpt2.kernels.report_rows import Row, expectation, render, violations

if TYPE_CHECKING:
    from fastgpt2.kernels.cases import CompileCase
    from fastgpt2.kernels.jit.compile import Resources

_HERE = Path(__file__).resolve().parent
REPORT = _HERE / "REPORT.md"


@dataclass(frozen=True)
class Task:
    """One thing to compile, by names that cross a process boundary."""

    module: str
    kernel: str
    config: str
    arch: str


def kernel_modules() -> list[str]:
    """The modules of ``kernels/jit`` that offer compile cases."""
    package = "fastgpt2.kernels.jit"
    names = (f"{package}.{m.name}" for m in pkgutil.iter_modules([str(_HERE / "jit")]))
    return [name for name in names if hasattr(importlib.import_module(name), "compile_cases")]


@lru_cache
def cases_of(module: str, arch: str) -> "dict[tuple[str, str], CompileCase]":
    """The compile cases of a module of ``kernels/jit`` by kernel and config."""
    cases = importlib.import_module(module).compile_cases(arch)
    by_name = {(case.name, case.config): case for case in cases}
    assert len(by_name) == len(cases), f"{module}: two cases for {arch} have one name"
    return by_name


def _fingerprint(case: "CompileCase", arch: str) -> str:
    """Changes with the kernel's source and its helpers', the case, Triton and the reader of it."""
    from fastgpt2.kernels import machine_code
    from fastgpt2.kernels.jit import compile as offline

    source = Path(offline.__file__).read_bytes() + Path(machine_code.__file__).read_bytes()
    # what the binary depends on: not the shape that it is judged at
    fields = set(case.__dataclass_fields__) - {"kernel", "flops", "bytes", "work", "per_sm"}
    parts = (
        case.kernel.cache_key,
        str([getattr(case, name) for name in sorted(fields)]),
        arch,
        offline.TRITON_VERSION,
        hashlib.sha256(source).hexdigest(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _resources(task: Task) -> "dict[str, Any]":
    """Fields of ``Resources``, or ``{"error": ...}``, from the cache or from the compiler."""
    from fastgpt2.kernels.jit.compile import compile_case

    case = cases_of(task.module, task.arch)[task.kernel, task.config]
    root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    entry = root / "fastgpt2" / "kernels" / f"{_fingerprint(case, task.arch)}.json"
    if entry.exists():
        found: dict[str, Any] = json.loads(entry.read_text(encoding="utf-8"))
        return found
    try:
        resources: Resources = compile_case(case, task.arch)
    except Exception as error:
        # whatever the compiler throws belongs into the table, and fails the check
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"}
    found = asdict(resources)
    write_text(entry, json.dumps(found))
    return found


def row_of(task: Task) -> Row:
    """Compile one case, unless its binary has been read before."""
    case = cases_of(task.module, task.arch)[task.kernel, task.config]
    return Row.of(case, task.arch, _resources(task))


def measure(modules: Iterable[str], archs: Iterable[str], jobs: int) -> list[Row]:
    """Compile every case of these modules for these architectures, in ``jobs`` processes."""
    tasks = [
        Task(module, kernel, config, arch)
        for module in modules
        for arch in archs
        for kernel, config in cases_of(module, arch)
    ]
    # a forked child would inherit the threads' locks of whatever has been imported
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        rows = list(tqdm(pool.map(row_of, tasks), total=len(tasks), unit="kernel"))
    return sorted(
        rows, key=lambda row: (row.kernel, row.config, list(ARCHITECTURES).index(row.arch))
    )


def expectation_file(triton: str, folder: Path = _HERE) -> Path:
    """Where the expectation of this Triton is recorded."""
    return folder / f"expectation-{triton}.json"


def find_expectation(triton: str, folder: Path = _HERE) -> dict[str, dict[str, Any]]:
    """The expectation of this Triton, or else of one that differs in the patch release only.

    Raises:
        UserError: there is none.
    """
    files = sorted(folder.glob(expectation_file("*").name))
    minor = expectation_file(".".join(triton.split(".")[:2]) + ".*").name
    near = [expectation_file(triton, folder), *(file for file in files if file.match(minor))]
    for file in near:
        if file.exists():
            found: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
            return found
    known = ", ".join(file.stem.removeprefix("expectation-") for file in files) or "none"
    raise UserError(
        f"--check: no expectation of Triton {triton} (recorded: {known}); --update records one"
    )


def _place(entry: tuple[str, Any]) -> tuple[str, str, int]:
    """An entry's place in the expectation: by kernel, config and architecture, as in the report."""
    kernel, config, arch = entry[0].split(" | ")
    return kernel, config, list(ARCHITECTURES).index(arch)


def _as_lines(expected: dict[str, dict[str, Any]]) -> str:
    """JSON with a line a kernel, so that a change shows as one."""
    rows = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in expected.items()]
    return "{\n" + ",\n".join(rows) + "\n}\n"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt2.kernels.report",
        description="Compile every kernel for GPUs that are not there and report what it needs.",
    )
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="repeatable")
    parser.add_argument("--gpu", choices=GPUS, help="roofline of this GPU (and only its arch)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare with the expectation")
    mode.add_argument("--update", action="store_true", help="record the expectation")
    return parser.parse_args(arguments)


def _body(options: argparse.Namespace) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("the report compiles kernels, which TRITON_INTERPRET=1 prevents: unset it")
    # the first GPU of each architecture, unless one is named
    gpus = {gpu.arch: gpu for gpu in reversed(GPUS.values())}
    archs = options.arch or list(ARCHITECTURES)
    if options.gpu:
        gpu = GPUS[options.gpu]
        gpus[gpu.arch] = gpu
        archs = options.arch or [gpu.arch]
    current = metadata.version("triton")
    # before the minutes that compiling takes
    expected = find_expectation(current) if options.check else {}
    rows = measure(kernel_modules(), archs, options.jobs)
    whole = set(archs) == set(ARCHITECTURES)
    if options.check:
        found = violations(rows, expected)
        print("\n".join([*found, f"{len(rows)} kernels checked, {len(found)} worse than expected"]))
        return 1 if found else 0
    print(render(rows, gpus))
    if whole:
        write_text(REPORT, render(rows, gpus))
    if options.update:
        file = expectation_file(current)
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() and not whole else {}
        found = {key: row for key, row in kept.items() if key.rpartition(" | ")[2] not in archs}
        write_text(file, _as_lines(dict(sorted((found | expectation(rows)).items(), key=_place))))
    return 1 if any(row.error for row in rows) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parse(arguments)
    return cli.run("kernels.report", lambda: _body(options))


if __name__ == "__main__":
    sys.exit(main())
