"""``python -m tools.soak DATA FOLDER``: training that is killed at random moments loses nothing.

For ``--minutes``, torchrun trains a small run on two ranks, one of which is killed every 20 to 60
seconds; torchrun ends, and the run is resumed. An unbroken run of the same configuration trains
beside it. At the end, the newest checkpoint of a step that both have saved must be the same, bit
for bit, and the memory of the unbroken ranks must not have grown.

With ``--kills N`` instead, short runs are killed N times, wherever they are then: in the
preparation of the data, in a step, in an evaluation, while they save or prune. They must end with
the weights of an unbroken run. The record of either is JSON on stdout.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import machine
from fastgpt2 import runs
from fastgpt2.weights import load
from fastgpt2.weights.safetensors_file import read_safetensors
from fastgpt2.weights.shards import read_shards
from tools.kills import Job, killed

SHAPE = "--tokenizer=bytes --model=gpt2-nano --block-size=32 --n-layer=2 --n-head=2 --n-embd=32"
LENGTH = "--batch-size=2 --grad-accum=2 --dropout=0.1 --log-every=5 --sample-tokens=5"
RATE = "--lr=1e-3 --schedule=constant --warmup-steps=10 --device=cpu --dtype=fp32"
# megabytes a minute that the memory of a rank may grow by, and seconds before it is measured
MAX_SLOPE, WARM_UP = 1.0, 60.0
# of both runs with --minutes: more than they reach
STEPS = 100_000_000


def flags(*more: str, shard: bool) -> list[str]:
    """The flags of a new run, but for its folder and its data."""
    kind = "--shard" if shard else "--no-shard"
    return [*SHAPE.split(), *LENGTH.split(), *RATE.split(), kind, *more]


def next_flags(run: Path, begin: list[str]) -> list[str]:
    """Resume, or begin again where no checkpoint was reached."""
    if run.exists() and runs.saved_steps(run):
        return ["--resume", "--out", str(run)]
    return [*begin, "--overwrite"] if runs.is_run(run) else begin


def saved_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Weights, moments and states of random numbers, whatever the form of the checkpoint."""
    if (checkpoint / runs.SHARDS).is_dir():
        tensors = read_shards(checkpoint / runs.SHARDS, load(checkpoint).config.vocab_size)
    else:
        tensors = {
            name: tensor
            for file in (runs.MODEL, runs.OPTIMIZER)
            for name, tensor in read_safetensors(checkpoint / file).items()
        }
    return {name: tensor.read() for name, tensor in tensors.items()}


def is_same(run: Path, expected: Path, step: int | None = None) -> bool:
    """Whether two runs have saved the same, bit for bit.

    Args:
        run: a run folder.
        expected: another one.
        step: of the two checkpoints; None means the newest ones.
    """
    ours, theirs = (
        saved_tensors(runs.latest(path) if step is None else runs.step_folder(path, step))
        for path in (run, expected)
    )
    # by numpy: the process that compares is forked again, and PyTorch may start threads
    same = (np.array_equal(ours[name].numpy(), x.numpy()) for name, x in theirs.items())
    return ours.keys() == theirs.keys() and all(same)


class Ranks:
    """Ranks under a torchrun.

    Args:
        arguments: the flags of the training.
        ranks: how many.
    """

    def __init__(self, arguments: list[str], ranks: int) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, *launcher, "-m", "fastgpt2.train", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def children(self) -> list[int]:
        """The ranks that there are now."""
        launcher = self.process.pid
        path = Path(f"/proc/{launcher}/task/{launcher}/children")
        return [int(x) for x in path.read_text(encoding="utf-8").split()] if path.exists() else []

    def kill(self, moments: random.Random) -> None:
        """Kill one of them; torchrun ends the others."""
        if victims := self.children():
            os.kill(moments.choice(victims), signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End them by the signal that makes them save."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


def resident(process: int) -> float:
    """Megabytes of a process's resident memory; 0 of one that has ended."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def slope(samples: list[tuple[float, float]]) -> float:
    """Megabytes a minute, of (seconds, megabytes), by least squares; 0 of fewer than ten."""
    if len(samples) < 10:
        return 0.0
    seconds, megabytes = np.array(samples).T
    return float(np.polyfit(seconds / 60, megabytes, 1)[0])


def soaked(
    begin: Callable[[Path], list[str]],
    folder: Path,
    ranks: int,
    minutes: float,
    every: tuple[float, float],
    moments: random.Random,
) -> dict[str, Any]:
    """Train for ``minutes`` with kills, and beside it without.

    Args:
        begin: the flags of a new run, given its folder.
        folder: gets the two runs.
        ranks: processes of each.
        minutes: how long.
        every: the fewest and the most seconds from a start to its kill.
        moments: the randomness of the kills.

    Returns:
        The number of kills, the last step that was compared, whether it was the same, and the
        growth of the memory of the unbroken ranks.
    """
    whole, run = folder / "whole", folder / "killed"
    began = time.monotonic()
    ending = began + minutes * 60
    # it keeps what the killed run may have to be compared with
    unbroken = Ranks([*begin(whole), "--keep-last=1000000"], ranks)
    samples: dict[int, list[tuple[float, float]]] = {}

    def watch(until: float, process: subprocess.Popen[bytes]) -> bool:
        """Sample the memory until a moment; False if the process has ended before."""
        while time.monotonic() < until:
            time.sleep(0.5)
            if time.monotonic() - began > WARM_UP:
                for child in unbroken.children():
                    place = samples.setdefault(child, [])
                    place.append((time.monotonic(), resident(child)))
            if process.poll() is not None:
                return False
        return True

    kills, code = 0, 0
    while time.monotonic() < ending:
        broken = Ranks(next_flags(run, [*begin(run), "--keep-last=2"]), ranks)
        patience = min(time.monotonic() + moments.uniform(*every), ending)
        if not watch(patience, broken.process):
            code = broken.process.returncode
            break
        if patience < ending:
            broken.kill(moments)
            kills += 1
        else:
            broken.stop()
    # the newest one may be of the step at which it was stopped
    last = max((s for s in runs.saved_steps(run) if runs.step_folder(whole, s).exists()), default=0)
    unbroken.stop()
    growth = {child: slope(places) for child, places in samples.items()}
    return {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "seconds_between_kills": list(every),
        "kills": kills,
        "exit_code": code,
        "step": last,
        "same": last > 0 and is_same(run, whole, last),
        "megabytes_per_minute": [round(x, 3) for x in growth.values()],
        "megabytes": [round(places[-1][1], 1) for places in samples.values()],
    }


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 0 if nothing was lost."""
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__)
    parser.add_argument("data", type=Path, help="a text")
    parser.add_argument("folder", type=Path, help="where the runs go; must not exist")
    parser.add_argument("--minutes", type=float, default=30.0, help="of kills [%(default)s]")
    parser.add_argument("--every", type=float, nargs=2, default=(20.0, 60.0), help="seconds")
    parser.add_argument("--kills", type=int, help="so many kills of a short run instead")
    parser.add_argument(
        "--life", type=float, default=2.0, help="of a killed start, seconds, at most"
    )
    parser.add_argument("--ranks", type=int, help="[2; with --kills 1]")
    parser.add_argument("--shard", action="store_true", help="the ranks share the weights out")
    parser.add_argument("--steps", type=int, default=400, help="with --kills [%(default)s]")
    parser.add_argument("--eval-every", type=int, help="[200; with --kills 10]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [%(default)s]")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True)
    ranks = options.ranks or (2 if options.kills is None else 1)
    eval_every = options.eval_every or (200 if options.kills is None else 10)
    moments = random.Random(options.seed)
    own = partial(flags, f"--eval-every={eval_every}", shard=options.shard)
    if options.kills is None:

        def begin(run: Path) -> list[str]:
            return ["--data", str(options.data), "--out", str(run), *own(f"--steps={STEPS}")]

        record = soaked(
            begin, options.folder, ranks, options.minutes, tuple(options.every), moments
        )
        grown = max(record["megabytes_per_minute"], default=0.0)
        sound = record["same"] and record["exit_code"] == 0 and grown < MAX_SLOPE
    else:
        more = own(f"--steps={options.steps}", "--keep-last=2")

        def job_in(folder: Path) -> Job:
            return Job(folder, options.data, ranks, more, next_flags)

        record = killed(job_in, options.folder, options.kills, moments, is_same, life=options.life)
        sound = not record["different"]
    record |= {"ranks": ranks, "sharded": options.shard, "machine": machine(torch.device("cpu"))}
    print(json.dumps(record, indent=2))
    return 0 if sound else 1


if __name__ == "__main__":
    raise SystemExit(main())
