"""``python -m fastgpt2.kernels.report``: what every kernel needs, on GPUs that are not there.

Compiles each kernel in each of its configurations for each architecture and reads the binaries:
registers, spills, shared memory, tensor-core instructions, and what the inner loop's instructions
are. Prints a table with blocks resident and times of a stated model, and writes it to
``kernels/REPORT.md``. ``--check`` compares with the committed expectation instead and fails on a
spill, on shared memory that no block can have, on lost tensor-core instructions, on 5 % more
instructions, and on a launch that gives a multiprocessor more blocks than fit: exit code 1. Another
compiler makes other binaries, so each Triton has an expectation of its own,
``expectation-VERSION.json`` by ``--update``, with ``--arch`` of those architectures alone; without
one there is nothing to compare with: exit code 2. Without ``--arch``, ``--check`` compares the
architectures that are recorded and names the others.

The expectation records a key with each binary: a hash of all that the binary depends on. A kernel
whose key is the recorded one is taken from there and not compiled. ``--check`` compiles a sample of
those all the same, other ones each day, and fails if a record is not what comes out; ``--all``
compiles every one of them.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from fastgpt2 import cli
from fastgpt2.download import cache_dir
from fastgpt2.errors import UserError
from fastgpt2.files import write_text
from fastgpt2.kernels.gpus import ARCHITECTURES, GPUS
from fastgpt2.kernels.report_rows import (
    Row,
    arch_of,
    expectation,
    render,
    resources,
    row_name,
    violations,
)

if TYPE_CHECKING:
    from fastgpt2.kernels.cases import CompileCase
    from fastgpt2.kernels.jit.compile import Resources

_HERE = Path(__file__).resolve().parent
REPORT = _HERE / "REPORT.md"
# one of each family: of these, the whole report lists every configuration
_DETAILED = ("sm_80", "sm_90", "sm_100", "gfx942")
# known kernels that a check recompiles, out of a thousand: they take a quarter of a minute
_SAMPLE = 12


@dataclass(frozen=True)
class Task:
    """One thing to compile, by names that cross a process boundary."""

    module: str
    kernel: str
    config: str
    arch: str
    # hash of everything that the binary depends on
    binary: str
    # compile even if the cache has it
    anew: bool = False

    @property
    def name(self) -> str:
        """Its row's name in the expectation."""
        return row_name(self.kernel, self.config, self.arch)

    @property
    def case(self) -> "CompileCase":
        """What ``module`` offers by this name."""
        return cases_of(self.module, self.arch)[self.kernel, self.config]


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


def _resources(task: Task) -> "dict[str, Any]":
    """Fields of ``Resources``, or ``{"error": ...}``, from the cache or from the compiler."""
    from fastgpt2.kernels.jit.compile import compile_case

    entry = cache_dir() / "kernels" / f"{task.binary}.json"
    if entry.exists() and not task.anew:
        found: dict[str, Any] = json.loads(entry.read_text(encoding="utf-8"))
        return found
    try:
        resources: Resources = compile_case(task.case, task.arch)
    except Exception as error:
        # whatever the compiler throws belongs into the table, and fails the check
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"}
    found = asdict(resources)
    # a cache that cannot be written saves no time, and costs nothing else
    with suppress(OSError):
        write_text(entry, json.dumps(found))
    return found


def _compiled(task: Task) -> Row:
    return Row.of(task.case, task.arch, _resources(task), task.binary)


def daily_sample(names: Iterable[str], count: int, day: int) -> set[str]:
    """``count`` of the names, others on the next day, until all have had their turn."""
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    begin = day * count % max(len(order), 1)
    return set((order + order)[begin : begin + min(count, len(order))])


def tasks_of(modules: Iterable[str], archs: Iterable[str]) -> list[Task]:
    """Every case of these modules of ``kernels/jit`` for these architectures."""
    from fastgpt2.kernels.jit.binary_key import binary_key

    return [
        Task(module, kernel, config, arch, binary_key(case, arch))
        for module in modules
        for arch in archs
        for (kernel, config), case in cases_of(module, arch).items()
    ]


def measure(
    tasks: Iterable[Task],
    jobs: int,
    recorded: Mapping[str, dict[str, Any]] | None = None,
    sample: int | None = 0,
) -> list[Row]:
    """The rows of the tasks, by kernel, config and architecture.

    Args:
        tasks: as ``tasks_of`` gives them.
        jobs: how many processes compile.
        recorded: an expectation; what has the key recorded there is not compiled.
        sample: how many of those are compiled all the same, today's; None for all of them.
    """
    tasks, recorded = list(tasks), recorded or {}
    known = [t for t in tasks if recorded.get(t.name, {}).get("binary") == t.binary]
    count = len(known) if sample is None else sample
    again = daily_sample([t.name for t in known], count, date.today().toordinal())
    believed = {t for t in known if t.name not in again}
    rows = [Row.of(t.case, t.arch, resources(recorded[t.name]), t.binary) for t in believed]
    todo = [replace(t, anew=t.name in again) for t in tasks if t not in believed]
    if todo:
        # a forked child would inherit the threads' locks of whatever has been imported
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(todo)), mp_context=context) as pool:
            rows += tqdm(pool.map(_compiled, todo), "compiling", len(todo), unit="kernel")
    return sorted(
        rows, key=lambda row: (row.kernel, row.config, list(ARCHITECTURES).index(row.arch))
    )


def expectation_file(triton: str, folder: Path = _HERE) -> Path:
    """Where the expectation of this Triton is recorded."""
    return folder / f"expectation-{triton}.json"


def read_expectation(file: Path) -> dict[str, dict[str, Any]]:
    """What is recorded there: nothing, if there is no such file."""
    found: dict[str, dict[str, Any]] = {}
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else found


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
            return read_expectation(file)
    known = ", ".join(file.stem.removeprefix("expectation-") for file in files) or "none"
    raise UserError(
        f"--check: no expectation of Triton {triton} (recorded: {known}); --update records one"
    )


def _place(entry: tuple[str, Any]) -> tuple[str, str, int]:
    """An entry's place in the expectation: by kernel, config and architecture, as in the report."""
    kernel, config, arch = entry[0].split(" | ")
    return kernel, config, list(ARCHITECTURES).index(arch)


def _as_lines(expected: dict[str, dict[str, Any]]) -> str:
    """JSON with one line per kernel, so that diffs are readable."""
    rows = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in expected.items()]
    return "{\n" + ",\n".join(rows) + "\n}\n"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt2.kernels.report",
        description="Compile every kernel, without a GPU, and report the resources it needs.",
    )
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="repeatable [all]")
    parser.add_argument(
        "--gpu", choices=GPUS, help="roofline of this GPU, and only its architecture"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes [cores]")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare with the expectation")
    mode.add_argument("--update", action="store_true", help="record the expectation")
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help=f"recompile N unchanged kernels [--check: {_SAMPLE}]",
    )
    again.add_argument("--all", action="store_true", help="recompile every kernel")
    return parser.parse_args(arguments)


def _recorded(archs: Sequence[str], expected: Iterable[str], triton: str) -> list[str]:
    """Those with rows in the expectation; the others are named on the standard output."""
    known = {arch_of(name) for name in expected}
    if unknown := [arch for arch in archs if arch not in known]:
        print(f"Triton {triton} has no record for {', '.join(unknown)}: --update --arch ARCH")
    return [arch for arch in archs if arch in known]


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
    file = expectation_file(current)
    # before the minutes that compiling may take
    expected = find_expectation(current) if options.check else read_expectation(file)
    if options.check and not (options.arch or options.gpu):
        archs = _recorded(archs, expected, current)
    sample = options.sample if options.sample is not None else _SAMPLE * options.check
    tasks = tasks_of(kernel_modules(), archs)
    rows = measure(tasks, options.jobs, expected, None if options.all else sample)
    whole = set(archs) == set(ARCHITECTURES)
    if options.check:
        found = violations(rows, expected)
        print("\n".join([*found, f"{len(rows)} kernels checked, {len(found)} worse than expected"]))
        return 1 if found else 0
    text = render(rows, gpus, _DETAILED if whole else archs)
    if whole:
        write_text(REPORT, text)
    if options.update:
        others = {key: row for key, row in expected.items() if arch_of(key) not in archs}
        write_text(file, _as_lines(dict(sorted((others | expectation(rows)).items(), key=_place))))
    # what took minutes is saved before it is shown
    print(text)
    return 1 if any(row.error for row in rows) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parse(arguments)
    return cli.run("kernels.report", lambda: _body(options), steady=not options.check)


if __name__ == "__main__":
    sys.exit(main())
