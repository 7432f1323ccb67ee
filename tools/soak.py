"""``python -m tools.soak DATA FOLDER``: train with ranks that are killed at random moments.

An unbroken run on several ranks comes first. Then a run of the same configuration is killed after a
random time and resumed, again and again. At the end both must have the same weights, bit for bit,
and the memory of the ranks must not have grown. By default this takes an hour;
``--minutes 2 --every 8 20 --steps 400 --eval-every 20`` takes a few minutes.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from fastgpt2 import runs

SHAPE = "--tokenizer=bytes --model=gpt2-nano --block-size=32 --n-layer=2 --n-head=2 --n-embd=32"
LENGTH = "--batch-size=2 --grad-accum=2 --dropout=0.1 --log-every=5 --sample-tokens=5"
# a rank's memory may grow by so many megabytes per minute
MAX_SLOPE = 1.0


def command(ranks: int, flags: list[str]) -> list[str]:
    """The program that starts ``ranks`` ranks on this machine."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *launcher, "-m", "fastgpt2.train", *flags]


def begin_flags(data: Path, run: Path, steps: int, eval_every: int) -> list[str]:
    """The flags of a new run."""
    own = [f"--steps={steps}", f"--eval-every={eval_every}", "--device=cpu", "--keep-last=2"]
    return ["--data", str(data), "--out", str(run), *SHAPE.split(), *LENGTH.split(), *own]


def next_flags(data: Path, run: Path, steps: int, eval_every: int) -> list[str]:
    """Flags that resume the run, or begin again if it has no checkpoint."""
    if run.exists() and runs.saved_steps(run):
        return ["--resume", "--out", str(run)]
    again = ["--overwrite"] if runs.is_run(run) else []
    return [*begin_flags(data, run, steps, eval_every), *again]


def workers(launcher: int) -> list[int]:
    """The ranks that a launcher has started."""
    path = Path(f"/proc/{launcher}/task/{launcher}/children")
    return (
        [int(child) for child in path.read_text(encoding="utf-8").split()] if path.exists() else []
    )


def resident(process: int) -> float:
    """Megabytes of a process's resident memory."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def slope(samples: list[tuple[float, float]]) -> float:
    """Megabytes per minute of (seconds, megabytes), by least squares; 0 for fewer than ten."""
    if len(samples) < 10:
        return 0.0
    seconds, megabytes = np.array(samples).T
    return float(np.polyfit(seconds / 60, megabytes, 1)[0])


def attempt(flags: list[str], ranks: int, patience: float) -> tuple[int | None, float]:
    """Start the ranks, and kill one of them after ``patience`` seconds.

    Returns:
        The exit code, None if the run was killed; and the slope of a rank's memory after its first
        20 seconds.
    """
    process = subprocess.Popen(command(ranks, flags), stdout=subprocess.DEVNULL)
    began = time.monotonic()
    samples: list[tuple[float, float]] = []
    while process.poll() is None and time.monotonic() - began < patience:
        time.sleep(0.5)
        children = workers(process.pid)
        if children and time.monotonic() - began > 20:
            samples.append((time.monotonic(), resident(children[0])))
    if process.poll() is not None:
        return process.returncode, slope(samples)
    for victim in workers(process.pid)[-1:]:
        os.kill(victim, signal.SIGKILL)
    process.wait()
    return None, slope(samples)


def same_weights(run: Path, expected: Path) -> bool:
    """Whether the newest checkpoints have the same weights and moments, bit for bit."""
    for name in (runs.MODEL, runs.OPTIMIZER):
        ours, theirs = (load_file(runs.latest(path) / name) for path in (run, expected))
        if ours.keys() != theirs.keys():
            return False
        if any(not np.array_equal(ours[key], theirs[key]) for key in theirs):
            return False
    return True


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 0 if nothing was lost."""
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__)
    parser.add_argument("data", type=Path, help="a text")
    parser.add_argument("folder", type=Path, help="new folder for both runs")
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="minutes of kills [%(default)s]"
    )
    parser.add_argument(
        "--every", type=float, nargs=2, default=(20.0, 60.0), help="seconds between kills [20 60]"
    )
    parser.add_argument("--ranks", type=int, default=2, help="number of processes [%(default)s]")
    parser.add_argument(
        "--steps", type=int, default=20_000, help="optimizer steps of both runs [%(default)s]"
    )
    parser.add_argument(
        "--eval-every", type=int, default=200, help="steps between evaluations [%(default)s]"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the times of the kills [%(default)s]"
    )
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True)
    moments = random.Random(options.seed)
    whole, run = options.folder / "whole", options.folder / "killed"
    size = (options.steps, options.eval_every)
    subprocess.run(
        command(options.ranks, begin_flags(options.data, whole, *size)),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    kills, worst, code = 0, 0.0, None
    ending = time.monotonic() + options.minutes * 60
    while code is None:
        late = time.monotonic() > ending
        patience = float("inf") if late else moments.uniform(*options.every)
        code, grown = attempt(next_flags(options.data, run, *size), options.ranks, patience)
        kills += code is None
        worst = max(worst, grown)
    same = code == 0 and same_weights(run, whole)
    print(f"{kills} kills; exit code {code}; weights {'equal' if same else 'DIFFERENT'}")
    print(f"memory of a rank: {worst:+.2f} MB per minute at most")
    return 0 if same and worst < MAX_SLOPE else 1


if __name__ == "__main__":
    raise SystemExit(main())
