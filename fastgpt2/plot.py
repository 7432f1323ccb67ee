"""``python -m fastgpt2.plot``: the curves of runs, side by side in one picture."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgpt2 import runs
from fastgpt2.cli import Parser, file_path
from fastgpt2.cli import run as run_command
from fastgpt2.errors import UserError
from fastgpt2.picture import draw, printable
from fastgpt2.train.curves import Curves, paint_runs
from fastgpt2.train.metrics import read_metrics
from fastgpt2.train.summary import duration

# suffixes of a picture
_FORMATS = (".png", ".svg")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="fastgpt2 plot",
        description="Compare runs: loss against tokens, steps and time; learning rate, gradient "
        "norm and tokens per second.",
    )
    parser.add_argument("runs", metavar="RUN", type=file_path, nargs="+", help="run folder")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=file_path,
        default=Path("runs.png"),
        help="the picture, .png or .svg [runs.png]",
    )
    return parser


def compare(folders: Sequence[Path], out: Path) -> list[str]:
    """Draw the curves of runs into one picture.

    Args:
        folders: the runs; they may still be training.
        out: the picture; its ending says whether it is a PNG or an SVG.

    Returns:
        what each run came to, a line each, and the picture's path.

    Raises:
        UserError: a folder is not a run or has measured nothing yet, the ending is another one, or
            the picture cannot be drawn.
    """
    if out.suffix.lower() not in _FORMATS:
        raise UserError(f"--out {out}: the name of the picture must end in .png or .svg")
    records = [_records(folder) for folder in folders]
    curves = [Curves(*pair) for pair in zip(_names(folders), records, strict=True)]
    reasons: list[str] = []
    if not draw(out, lambda: paint_runs(curves), notify=reasons.append):
        raise UserError(" ".join(reasons))
    return [*(_came_to(run) for run in curves), f"picture: {out}"]


def _records(folder: Path) -> list[dict[str, Any]]:
    if not runs.is_run(folder):
        raise UserError(f"{folder}: not a run folder (it has no {runs.RUN_CONFIG})")
    records = read_metrics(folder)
    if not records:
        raise UserError(f"{folder}: the run has measured nothing yet")
    return records


def _names(folders: Sequence[Path]) -> list[str]:
    """Each folder's name; of folders that share one, the path."""
    names = [folder.absolute().name for folder in folders]
    paths = [str(folder) for folder in folders]
    return [
        printable(name if names.count(name) == 1 else path)
        for name, path in zip(names, paths, strict=True)
    ]


def _came_to(run: Curves) -> str:
    last = run.records[-1]
    text = f"{run.name}: {last['step']:,} steps, {last.get('tokens', 0):,} tokens"
    if "elapsed" in last:
        text += f", {duration(last['elapsed'])}"
    scored = [record for record in run.records if "val_loss" in record]
    if scored:
        best = min(scored, key=lambda record: float(record["val_loss"]))
        text += f"; best validation loss {best['val_loss']:.4f}, at step {best['step']:,}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, draw, print what the runs came to; the exit code."""
    args = build_parser().parse_args(argv)

    def body() -> None:
        print("\n".join(compare(args.runs, args.out)))

    # the picture matters more than what stands on the terminal
    return run_command("plot", body, steady=True)


if __name__ == "__main__":
    raise SystemExit(main())
