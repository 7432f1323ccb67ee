"""``python -m tools.step_history --out FILE COMMIT ...``: time a training step at each commit.

Trains GPT-2 124M with the package of each commit, eager and compiled, alternating in separate
processes. Prints a table of medians in milliseconds, and writes every step's time as JSON.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.processes import ask, write_runs
from fastgpt2.cli import Parser, check_counts
from fastgpt2.cli import run as run_command
from fastgpt2.errors import UserError
from tools.step_of_commit import SCALES, STEP_DTYPES

_ROOT = Path(__file__).resolve().parents[1]
_PROGRAM = _ROOT / "tools" / "step_of_commit.py"
FORMS = ("eager", "compiled")


def check_out(commit: str, folder: Path) -> tuple[str, str]:
    """Extract the commit's package into ``folder``; returns its short hash and subject.

    Raises:
        UserError: there is no such commit.
    """

    def git(*arguments: str) -> bytes:
        command = ["git", "-C", str(_ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            raise UserError(f"{commit}: {done.stderr.decode().strip().splitlines()[0]}")
        return done.stdout

    name, _, subject = git("log", "-1", "--format=%h %s", commit, "--").decode().partition(" ")
    archive = git("archive", name, "--", "fastgpt2", "kernels")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return name, subject.strip()


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Medians over the processes of each commit, a column for each form."""
    forms = list(dict.fromkeys(run["form"] for run in runs))
    lines = [" ".join([f"{'commit':10}", *(f"{form:>11}" for form in forms)])]
    for name in dict.fromkeys(run["commit"] for run in runs):
        own = [run for run in runs if run["commit"] == name]
        found = [
            [s for run in own if run["form"] == form for s in run["seconds"]] for form in forms
        ]
        lines.append(" ".join([f"{name:10}", *(f"{median(s) * 1e3:8.0f} ms" for s in found)]))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(prog="python -m tools.step_history")
    parser.add_argument("commits", nargs="+", metavar="COMMIT", help="what to compare, in order")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON to write")
    parser.add_argument(
        "--dtype", default="bf16", choices=list(STEP_DTYPES), help="compute dtype [%(default)s]"
    )
    parser.add_argument(
        "--form", action="append", choices=FORMS, help="only this one; repeatable [both]"
    )
    parser.add_argument("--turns", type=int, default=2, help="processes per commit and form [2]")
    parser.add_argument("--steps", type=int, default=4, help="timed steps per process [4]")
    parser.add_argument("--scale", default="cpu", choices=list(SCALES), help="sizes [%(default)s]")
    options = parser.parse_args(arguments)
    return run_command("step_history", lambda: _body(options), steady=True)


def _body(options: argparse.Namespace) -> int:
    check_counts(options, "turns", "steps")
    own = [options.dtype, str(options.steps), options.scale]
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        trees = []
        for number, commit in enumerate(options.commits):
            folder = Path(temporary, str(number))
            folder.mkdir()
            trees.append((folder, *check_out(commit, folder)))
        forms = options.form or FORMS
        plan = [(form, *tree) for _ in range(options.turns) for tree in trees for form in forms]
        for form, folder, name, subject in tqdm(plan):
            # -P: do not import the modules beside the program, which are not of that commit
            command = [sys.executable, "-P", str(_PROGRAM), form, *own]
            seconds = ask(f"{name}, {form}", command, PYTHONPATH=str(folder))
            if seconds is None:
                return 1
            runs.append({"commit": name, "subject": subject, "form": form, "seconds": seconds})
            write_runs(options.out, options.dtype, runs)
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
