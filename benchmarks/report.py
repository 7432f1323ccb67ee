"""``python -m benchmarks.report JSON...``: tables, plots, and slowdowns.

Reads files of ``pytest benchmarks --benchmark-only --benchmark-json FILE`` (several files of one
machine are merged). Writes ``benchmarks/results/<date>_<machine>.md`` with pictures, the numbers as
JSON beside it, and the README's table between its markers. Compares with the last committed result
of the same machine: each of our benchmarks that is slower by more than the noise (defined in
``results.compare``) is listed, and the exit code is 1.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.plots import draw
from benchmarks.results import Change, Run, compare
from benchmarks.tables import import_line, machine_lines, race_table, readme_lines
from fastgpt2.cli import Parser, run
from fastgpt2.errors import UserError
from fastgpt2.files import write_text

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks: begin (python -m benchmarks.report) -->", "<!-- benchmarks: end -->"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        # no repository, or nothing committed
        return ""


def last_committed(folder: Path, slug: str) -> tuple[str, Run] | None:
    """The newest result of this machine in the last commit, with its name.

    Uncommitted results do not count: they may be slow runs that must not become the baseline.
    """
    names = _git(folder, "ls-tree", "--name-only", "HEAD", "./").split()
    name = max((name for name in names if name.endswith(f"_{slug}.json")), default=None)
    if name is None:
        return None
    return name, Run.parse(_git(folder, "show", f"HEAD:./{name}"), name)


def report(measured: Run, pictures: Sequence[Path], changes: Sequence[Change] | None) -> str:
    """The Markdown file."""
    lines = [f"# Benchmarks, {measured.machine['device']}, {measured.date}", ""]
    lines += [*machine_lines(measured), ""]
    lines += [
        "Medians of alternating samples, with their 20th and 80th percentiles; every contender's",
        "result was checked on the timed inputs before. Ours are bold; *ours is x faster* is the",
        "contender's time over that of ours in the same form, eager or compiled; *no difference*",
        "says that the 20-80 % ranges of the two overlap.",
        "MFU is (6 N + 12 L C T) FLOPs per token over the data-sheet peak, *of matmul* the same",
        "FLOPs over the large matmul above; roofline is",
        "max(FLOPs / matmul, bytes / copy) over the time. A loss that takes its gradient in the",
        "forward pass (`linear_cross_entropy`) compares in mode *both* only.",
        "",
    ]
    lines += [f"![{picture.stem}]({picture.name})\n" for picture in pictures]
    if changes is not None:
        lines += ["## Against the last result", "", *_changes(changes), ""]
    if (line := import_line(measured)) is not None:
        lines += [line, ""]
    for name, group in measured.groups().items():
        lines += [f"## {name}", "", *race_table(group), ""]
    return "\n".join(lines)


def _changes(changes: Sequence[Change]) -> list[str]:
    slower = [change.line() for change in changes if change.is_slower]
    if not changes:
        return ["Nothing that both have measured."]
    return [f"- {line}" for line in slower] or [
        f"None of {len(changes)} benchmarks of ours is slower by more than the noise."
    ]


def with_table(readme: str, table: str) -> str:
    """The README with ``table`` between its markers.

    Raises:
        UserError: the markers are missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"README: the markers {BEGIN!r} and {END!r} are not there")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def readme_table(folder: Path, root: Path) -> str:
    """The newest result of every machine, GPUs first."""
    # names begin with the date: later results replace earlier ones
    newest = {path.stem.partition("_")[2]: path for path in sorted(folder.glob("*.json"))}
    results = [
        (Run.parse(path.read_text(encoding="utf-8"), path.name), path.with_suffix(".md"))
        for path in newest.values()
    ]
    results.sort(key=lambda pair: (pair[0].machine["scale"] != "cuda", pair[0].slug))
    return "\n\n".join(
        [
            measured_line([result for result, _ in results]),
            *(
                "\n".join(readme_lines(result, path.relative_to(root).as_posix()))
                for result, path in results
            ),
        ]
    )


def measured_line(results: Sequence[Run]) -> str:
    """What was measured, what was not, and how to read the tables."""
    gpus = [run.machine["device"] for run in results if run.machine["scale"] == "cuda"]
    measured = (
        f"Measured on {', '.join(gpus)}, and on the processors below."
        if gpus
        else "No GPU run yet: the Triton kernels are checked in the interpreter and compiled for\n"
        "GPUs, and their speed is not measured. What follows was measured on processors."
    )
    return (
        f"{measured}\n\nMore than 1 means that ours is faster, the brackets hold the range of the\n"
        "20th to 80th percentiles, and where that range includes 1 the row says *no difference*.\n"
        "Eager forms are compared with eager ones, compiled with compiled."
    )


def _body(options: argparse.Namespace) -> int:
    measured = Run.of(options.files)
    folder: Path = options.results
    stem = f"{measured.date}_{measured.slug}"
    folder.mkdir(parents=True, exist_ok=True)
    last = last_committed(folder, measured.slug)
    changes = None if last is None else compare(measured, last[1])
    pictures = draw(measured, folder, stem)
    write_text(folder / f"{stem}.md", report(measured, pictures, changes))
    write_text(folder / f"{stem}.json", measured.dump())
    readme: Path = options.readme
    table = readme_table(folder, readme.parent)
    write_text(readme, with_table(readme.read_text(encoding="utf-8"), table))
    print(f"wrote {folder / f'{stem}.md'}")
    slower = [change.line() for change in changes or () if change.is_slower]
    if last is not None:
        print(f"compared with {last[0]}: {len(slower)} of {len(changes or ())} slower")
    print("\n".join(slower), end="\n" if slower else "")
    return 1 if slower else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 1 if one of our benchmarks is slower."""
    parser = Parser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="JSON", help="results of one machine"
    )
    results = ROOT / "benchmarks" / "results"
    parser.add_argument(
        "--results",
        type=Path,
        default=results,
        metavar="DIR",
        help="folder for the report [benchmarks/results]",
    )
    parser.add_argument(
        "--readme",
        type=Path,
        default=ROOT / "README.md",
        metavar="FILE",
        help="file with the table to replace [README.md]",
    )
    options = parser.parse_args(argv)
    return run("report", lambda: _body(options))


if __name__ == "__main__":
    sys.exit(main())
