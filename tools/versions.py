"""``python -m tools.versions``: the kernels with every supported pair of PyTorch and Triton.

Makes an environment for each pair in FOLDER, from constraints.txt except for torch and triton. Runs
the kernels' tests (interpreted) and the compile matrix, and prints one line per pair at the end. A
Triton without an expectation gets one, ``kernels/expectation-VERSION.json``, to be reviewed and
committed. Exit code 1 if a pair failed. Existing environments are reused.
"""

import argparse
import os
import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgpt2 import cli
from fastgpt2.errors import UserError
from fastgpt2.files import write_text
from fastgpt2.kernels.report import REPORT, expectation_file

ROOT = Path(__file__).resolve().parents[1]
# each PyTorch with the Triton it was released for, and the tested PyTorch with every Triton
PAIRS = (
    ("2.11.0", "3.6.0"),
    ("2.12.0", "3.7.1"),
    ("2.13.0", "3.6.0"),
    ("2.13.0", "3.7.1"),
    ("2.13.0", "3.8.0"),
    ("2.13.0", "3.9.0"),
    ("2.14.1", "3.8.0"),
)
# packages that the kernels' tests import
PACKAGES = (
    "hypothesis",
    "matplotlib",
    "numpy",
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",
    "regex",
    "safetensors",
    "setuptools",
    "tiktoken",
    "tqdm",
)


@dataclass(frozen=True)
class Pair:
    """A PyTorch and a Triton, by version."""

    torch: str
    triton: str

    @property
    def name(self) -> str:
        """``torch-2.13.0-triton-3.9.0``: the name of the environment's folder and logs."""
        return f"torch-{self.torch}-triton-{self.triton}"


def parse_pair(text: str) -> Pair:
    """``2.13.0,3.9.0`` as a pair.

    Raises:
        UserError: the text is something else.
    """
    found = re.fullmatch(r"(\d+\.\d+\.\d+),(\d+\.\d+\.\d+)", text)
    if found is None:
        raise UserError(f"--pair: expected TORCH,TRITON such as 2.13.0,3.9.0, got {text!r}")
    return Pair(*found.groups())


def constraints(pair: Pair, text: str) -> str:
    """constraints.txt without torch and triton, with this pair's torch.

    The interpreter of Triton 3.6 fails with numpy 2.4, which no longer accepts an array of one
    element as an integer.
    """
    lines = [line for line in text.splitlines() if not re.match(r"(torch|triton)==", line)]
    if pair.triton.startswith("3.6."):
        lines = ["numpy<2.4" if line.startswith("numpy==") else line for line in lines]
    return "\n".join([*lines, f"torch=={pair.torch}", ""])


def steps(pair: Pair, python: str, folder: Path, jobs: int) -> list[tuple[str, list[str]]]:
    """(name, command) of each step for a pair, in order."""
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    report = [python, "-m", "fastgpt2.kernels.report", "--jobs", str(jobs)]
    mode = "--check" if expectation_file(pair.triton).exists() else "--update"
    own = str(folder / f"{pair.name}.txt")
    return [
        ("install", [*pip, "-c", own, f"torch=={pair.torch}", *PACKAGES]),
        # torch requires one Triton version: replace it afterwards
        ("triton", [*pip, "--no-deps", f"triton=={pair.triton}"]),
        ("tests", [python, "-m", "pytest", "-q", "-n", str(jobs), "tests/kernels"]),
        ("matrix", [*report, mode]),
    ]


def run_pair(pair: Pair, folder: Path, jobs: int) -> str:
    """Run the steps of a pair, each with a log; returns what failed, or an empty string."""
    environment = folder / pair.name
    if not environment.exists():
        venv.create(environment, with_pip=True)
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    write_text(folder / f"{pair.name}.txt", constraints(pair, text))
    python = str(environment / "bin" / "python")
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONHOME")}
    variables = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name, command in steps(pair, python, folder, jobs):
        print(f"{pair.name}: {name}", flush=True)
        log = folder / f"{pair.name}-{name}.log"
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode != 0:
            return f"{name} ended with exit code {done.returncode}, see {log}"
    return ""


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m tools.versions",
        description="Test the kernels with every supported pair of PyTorch and Triton.",
    )
    parser.add_argument("folder", type=Path, help="for environments and logs: up to 6 GB per pair")
    parser.add_argument("--pair", action="append", help="TORCH,TRITON; repeatable [all]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes [cores]")
    return parser.parse_args(arguments)


def _body(options: argparse.Namespace) -> int:
    pairs = [parse_pair(text) for text in options.pair or ()] or [Pair(*pair) for pair in PAIRS]
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # the committed report is that of the tested pair
    report = REPORT.read_text(encoding="utf-8")
    try:
        faults = {pair: run_pair(pair, folder, options.jobs) for pair in pairs}
    finally:
        write_text(REPORT, report)
    for pair, fault in faults.items():
        print(f"{pair.name}: {fault or 'passes'}")
    return 1 if any(faults.values()) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parse(arguments)
    return cli.run("tools.versions", lambda: _body(options), steady=True)


if __name__ == "__main__":
    sys.exit(main())
