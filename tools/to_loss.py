"""``python -m tools.to_loss TEXT NANOGPT --out FILE``: race nanoGPT to its own loss.

TEXT is Tiny Shakespeare, NANOGPT a checkout of https://github.com/karpathy/nanoGPT. nanoGPT's own
``prepare.py`` and ``train.py`` run as its README says for a CPU (except for the seed). They
alternate with ``fastgpt2 train --config shakespeare-char --optimizer muon``, each in its own
process. Times count from the start of the process, with imports and validations.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import machine
from fastgpt2.cli import Parser, check_counts
from fastgpt2.cli import run as run_command
from fastgpt2.errors import UserError
from fastgpt2.files import write_text
from tools.optimizer_sweep import TARGET

Summary = Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
# its README, "I only have a macbook", except for the seed
_THEIRS = (
    *("config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20"),
    *("--log_interval=100", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4"),
    *("--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
)
_OURS = ("--config=shakespeare-char", "--optimizer=muon", "--device=cpu", "--sample-tokens=0")
# a validation in the output of either program: step and loss
_VALIDATION = re.compile(r"step (\d+): .*?(?:val|validation) loss (\d+\.\d+)")
_SEED = "torch.manual_seed(1337 + seed_offset)"


def curve(command: Sequence[str], folder: Path) -> list[dict[str, float]]:
    """Run a command in ``folder``; returns each validation's step, loss and seconds from the start.

    Raises:
        UserError: it failed, or had no validation.
    """
    began, points, tail = time.perf_counter(), [], ""
    with subprocess.Popen(
        [sys.executable, "-u", *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            tail = line.strip() or tail
            found = _VALIDATION.search(line)
            if found:
                seconds = round(time.perf_counter() - began, 2)
                step, loss = int(found[1]), float(found[2])
                points.append({"step": step, "val_loss": loss, "seconds": seconds})
    if child.returncode or not points:
        raise UserError(f"{' '.join(command)}: exit code {child.returncode}, {tail}")
    return points


def seeded(nanogpt: Path, seed: int, folder: Path) -> None:
    """Copy nanoGPT and set its seed, which is not among its settings.

    Raises:
        UserError: the folder is not a checkout of nanoGPT.
    """
    program = nanogpt / "train.py"
    text = program.read_text(encoding="utf-8") if program.exists() else ""
    # check before copying: another folder may be large, or contain this one
    if _SEED not in text:
        raise UserError(f"{nanogpt}: not a checkout of nanoGPT with `{_SEED}` in its train.py")
    shutil.copytree(nanogpt, folder, ignore=shutil.ignore_patterns(".git"))
    write_text(folder / "train.py", text.replace(_SEED, f"torch.manual_seed({seed})"))


def race(text: Path, nanogpt: Path, seeds: int, record: dict[str, Any], out: Path) -> None:
    """Run both for each seed; the file is written after each run."""
    for seed in range(1, seeds + 1):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            theirs = folder / "nanogpt"
            seeded(nanogpt, seed, theirs)
            data = theirs / "data" / "shakespeare_char"
            shutil.copyfile(text, data / "input.txt")
            subprocess.run([sys.executable, data / "prepare.py"], check=True, capture_output=True)
            where = (f"--data={text.resolve()}", f"--out={folder / 'run'}", f"--seed={seed}")
            programs = {
                "nanogpt": (("train.py", *_THEIRS), theirs),
                "fastgpt2": (("-m", "fastgpt2.train", *_OURS, *where), folder),
            }
            for who, (command, at) in sorted(programs.items(), reverse=seed % 2 == 0):
                run = {"who": who, "seed": seed, "curve": curve(command, at)}
                note(run, record, summary, out)


def note(run: dict[str, Any], record: dict[str, Any], summary: Summary, out: Path) -> None:
    """Write all runs so far and this one, with their summary, then show how it ended."""
    record["runs"].append(run)
    record["summary"] = summary(record["runs"])
    write_text(out, json.dumps(record, indent=1) + "\n")
    print(f"seed {run['seed']}, {run['who']}: {run['curve'][-1]}", flush=True)


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each program's last losses, and when it first reached the target (or ended)."""
    result: dict[str, Any] = {"target": TARGET}
    for who in ("nanogpt", "fastgpt2"):
        own = [run["curve"] for run in runs if run["who"] == who]
        ends = [next((p for p in c if p["val_loss"] <= TARGET), c[-1]) for c in own]
        result[who] = {
            "last_losses": [c[-1]["val_loss"] for c in own],
            "steps": [p["step"] for p in ends],
            "seconds": [p["seconds"] for p in ends],
        }
    a, b = (result[who] for who in ("fastgpt2", "nanogpt"))
    if a["seconds"] and b["seconds"]:
        result["share_of_steps"] = round(median(a["steps"]) / median(b["steps"]), 3)
        result["share_of_seconds"] = round(median(a["seconds"]) / median(b["seconds"]), 3)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(prog="python -m tools.to_loss")
    parser.add_argument("text", type=Path, metavar="TEXT", help="tinyshakespeare.txt")
    parser.add_argument("nanogpt", type=Path, metavar="NANOGPT", help="a checkout of nanoGPT")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON to write")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="pairs of runs [3]")
    options = parser.parse_args(arguments)
    body = partial(race, options.text, options.nanogpt, options.seeds)
    return run_command("to_loss", lambda: recorded(body, options), steady=True)


def recorded(body: Callable[[dict[str, Any], Path], None], options: argparse.Namespace) -> int:
    """Run a race on this machine, and show its summary; returns the exit code.

    Args:
        body: given the record so far, to which ``note`` adds each run, and the file to write.
        options: has ``seeds`` and ``out``.

    Raises:
        UserError: ``seeds`` is not a count.
    """
    check_counts(options, "seeds")
    record: dict[str, Any] = {"machine": machine(torch.device("cpu")), "runs": []}
    body(record, options.out)
    print(json.dumps(record["summary"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
