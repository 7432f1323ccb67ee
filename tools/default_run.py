"""``python -m tools.default_run --out FILE``: the default run on a CPU, by AdamW and by Muon.

Both are ``fastgpt2 train --compile`` with nothing else chosen, in turns, each in its own process.
The loss at AdamW's end is the target of its pair. Muon reaches it at its first validation that is
as low. Times count from the start of the process, with imports and compiling. The vocabulary is
what a user of this machine gets: GPT-2's, or bytes where it cannot be downloaded.
"""

import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from fastgpt2.cli import Parser
from fastgpt2.cli import run as run_command
from fastgpt2.runs import find_tokenizer
from tools.to_loss import curve, note, recorded

_SAME = ("-m", "fastgpt2.train", "--config=cpu", "--device=cpu", "--compile", "--sample-tokens=0")
_OPTIMIZERS = ("adamw", "muon")


def race(seeds: int, record: dict[str, Any], out: Path) -> None:
    """Run both for each seed; the file is written after each run."""
    for seed in range(1, seeds + 1):
        for who in sorted(_OPTIMIZERS, reverse=seed % 2 == 0):
            with tempfile.TemporaryDirectory() as name:
                run = Path(name) / "run"
                flags = (f"--optimizer={who}", f"--out={run}", f"--seed={seed}")
                points = curve((*_SAME, *flags), Path(name))
                tokenizer = find_tokenizer(run)
            vocabulary = tokenizer.vocab_size if tokenizer else None
            fact = {"who": who, "seed": seed, "vocab_size": vocabulary, "curve": points}
            note(fact, record, summary, out)


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each seed: AdamW's last validation, and Muon's first with a loss as low (or its last)."""
    curves = {(run["who"], run["seed"]): run["curve"] for run in runs}
    pairs = []
    for who, seed in curves:
        if who == "adamw" and ("muon", seed) in curves:
            end = curves[who, seed][-1]
            muon = curves["muon", seed]
            reached = next((p for p in muon if p["val_loss"] <= end["val_loss"]), None)
            share = round(reached["seconds"] / end["seconds"], 3) if reached else None
            pairs.append({"seed": seed, "adamw": end, "muon": reached or muon[-1], "share": share})
    shares = [pair["share"] for pair in pairs]
    return {"pairs": pairs, "share_of_seconds": median(shares) if shares and all(shares) else None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(prog="python -m tools.default_run")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON to write")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="pairs of runs [2]")
    options = parser.parse_args(arguments)
    body = partial(race, options.seeds)
    return run_command("default_run", lambda: recorded(body, options), steady=True)


if __name__ == "__main__":
    sys.exit(main())
