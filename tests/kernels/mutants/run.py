"""``python -m tests.kernels.mutants.run [--op NAME ...] [--jobs N] [--sample N]``

Applies every mutant, one at a time, to a copy of the tree and runs the tests it names: at least
one must fail. The same tests must pass on the unmutated copy. The working tree is never touched.
Exit code 1 if a mutant survives, 2 if the list itself is wrong.
"""

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

import tests.kernels.mutants as package
from tests.kernels.mutants import Mutant, StaleMutant, mutate
from tests.spread import spread

ROOT = Path(__file__).resolve().parents[3]
_COPIED = ("fastgpt2", "kernels", "tests", "pyproject.toml")
# of processor time, far above what the named tests need: a mutant that loops forever is killed
_LIMIT_S = 300
# pytest's exit codes
_PASSED, _FAILED = 0, 1


@dataclass(frozen=True)
class Verdict:
    """What the tests said of one mutant: ``killed``, ``SURVIVED`` or an error."""

    op: str
    name: str
    outcome: str
    detail: str = ""


def load_mutants(ops: Sequence[str] = ()) -> dict[str, list[Mutant]]:
    """The committed lists by op, all of them or those named.

    Raises:
        StaleMutant: an op is unknown, or a mutant's old text is not in its file exactly once.
    """
    known = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "run")
    unknown = sorted(set(ops) - set(known))
    if unknown:
        raise StaleMutant(f"no mutants for {', '.join(unknown)}; there are {', '.join(known)}")
    mutants = {
        op: list(importlib.import_module(f"{package.__name__}.{op}").MUTANTS)
        for op in known
        if not ops or op in ops
    }
    for mutant in (m for listed in mutants.values() for m in listed):
        mutate(mutant, (ROOT / mutant.path).read_text(encoding="utf-8"))
    return mutants


def copy_tree(root: Path, target: Path) -> None:
    """The parts of the repository that the tests need, without compiled files."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for name in _COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True, ignore=ignore)
        elif source.exists():
            shutil.copy2(source, target / name)


@lru_cache
def _forks() -> Any:
    """Processes forked from one that has imported what is not mutated: half of a test's time."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        # a mutated file may have the size and the second of the file it replaces
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    context = multiprocessing.get_context("forkserver")
    # the first decides whether kernels are interpreted, before triton is imported
    context.set_forkserver_preload(["tests.conftest", "triton", "torch._dynamo", "hypothesis"])
    return context


def _pytest(tree: Path, tests: Sequence[str], output: Path) -> None:
    """Run pytest on the tree's files in this process, and exit with its code."""
    resource.setrlimit(resource.RLIMIT_CPU, (_LIMIT_S, _LIMIT_S))
    with output.open("w", encoding="utf-8") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path) != ROOT)]
    os.environ["PYTHONPATH"] = str(tree)
    os.chdir(tree)
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))


def run_tests(tree: Path, tests: Iterable[str]) -> tuple[int, str]:
    """pytest's exit code on these node ids, run inside ``tree``, and the test that failed."""
    output = tree / "output.txt"
    process = _forks().Process(target=_pytest, args=(tree, list(dict.fromkeys(tests)), output))
    process.start()
    process.join()
    if process.exitcode == -signal.SIGXCPU:
        return _FAILED, f"no end within {_LIMIT_S} s of a processor"
    if process.exitcode < 0:
        # an edit that writes beyond its memory may end the whole process
        return _FAILED, f"a crash, {signal.Signals(-process.exitcode).name}"
    lines = output.read_text(encoding="utf-8").splitlines()
    failed = next((line for line in lines if line.startswith("FAILED ")), "")
    return process.exitcode, failed.removeprefix("FAILED ").partition(" - ")[0]


def judge(tree: Path, op: str, mutant: Mutant) -> Verdict:
    """Apply the mutant to the copy, run its tests, take the edit back."""
    path = tree / mutant.path
    source = path.read_text(encoding="utf-8")
    path.write_text(mutate(mutant, source), encoding="utf-8")
    try:
        code, failed = run_tests(tree, mutant.tests)
    finally:
        path.write_text(source, encoding="utf-8")
    if code == _PASSED:
        return Verdict(op, mutant.name, "SURVIVED", mutant.why)
    if code != _FAILED:
        return Verdict(op, mutant.name, "ERROR", f"pytest exit code {code}: tests not found?")
    return Verdict(op, mutant.name, "killed", f"by {failed}")


def judge_unmutated(tree: Path, op: str, mutants: Sequence[Mutant]) -> Verdict:
    """The named tests must pass before any edit, or their failing proves nothing."""
    code, failed = run_tests(tree, (test for mutant in mutants for test in mutant.tests))
    if code == _PASSED:
        return Verdict(op, "(unmutated)", "passes")
    return Verdict(op, "(unmutated)", "ERROR", f"pytest exit code {code} without any edit {failed}")


def judge_all(mutants: dict[str, list[Mutant]], jobs: int, root: Path = ROOT) -> Iterator[Verdict]:
    """Judge in ``jobs`` copies of the tree; yields verdicts as they come, in the lists' order.

    There is one per op for its unmutated run, then one per mutant.
    """
    tasks: list[tuple[str, Mutant | None]] = []
    for op, listed in mutants.items():
        tasks += [(op, None), *((op, mutant) for mutant in listed)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        trees: SimpleQueue[Path] = SimpleQueue()
        for job in range(jobs):
            tree = Path(folder) / str(job)
            tree.mkdir()
            copy_tree(root, tree)
            trees.put(tree)

        def work(task: tuple[str, Mutant | None]) -> Verdict:
            op, mutant = task
            tree = trees.get()
            try:
                if mutant is None:
                    return judge_unmutated(tree, op, mutants[op])
                return judge(tree, op, mutant)
            finally:
                trees.put(tree)

        yield from pool.map(work, tasks)


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge the mutants, print each verdict at once, return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.mutants.run")
    parser.add_argument("--op", action="append", default=[], help="only this op; repeatable")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="copies at work")
    parser.add_argument("--sample", type=int, metavar="N", help="at most N mutants an op")
    options = parser.parse_args(arguments)
    try:
        mutants = load_mutants(options.op)
    except StaleMutant as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.sample is not None:
        mutants = {op: spread(listed, options.sample) for op, listed in mutants.items()}
    outcomes = []
    for verdict in judge_all(mutants, options.jobs):
        line = f"{verdict.op:24} {verdict.name:40} {verdict.outcome:9} {verdict.detail}"
        print(line.rstrip(), flush=True)
        outcomes.append(verdict.outcome)
    killed, survived = outcomes.count("killed"), outcomes.count("SURVIVED")
    print(f"{killed} killed, {survived} survived, {outcomes.count('ERROR')} errors")
    if "ERROR" in outcomes:
        return 2
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
