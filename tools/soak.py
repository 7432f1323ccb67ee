"""``python -m tools.soak DATA FOLDER``: training that is killed at random moments loses nothing.

For ``--minutes``, a small run trains on two ranks, one of which is killed every 20 to 60 seconds;
the other one has to end, and the run is resumed. An unbroken run of the same configuration trains
beside it. At the end, the newest checkpoint of a step that both have saved must be the same, bit
for bit, and the memory of the unbroken ranks must not have grown.

With ``--kills N`` instead, short runs are killed N times, wherever they are then: in the
preparation of the data, in a step, in an evaluation, while they save or prune. They must end with
the weights of an unbroken run, whose memory must not have grown. The record of either is JSON,
shown and kept as ``FOLDER/record.json``.
"""

import argparse
import json
import os
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import machine
from fastgpt2 import runs
from fastgpt2.cli import Parser
from fastgpt2.cli import run as run_command
from fastgpt2.errors import UserError
from fastgpt2.files import write_text
from fastgpt2.weights import load
from fastgpt2.weights.safetensors_file import read_safetensors
from fastgpt2.weights.shards import read_shards
from tools.kills import GRACE, Job, ended, killed, resident

SHAPE = "--tokenizer=bytes --model=gpt2-nano --block-size=32 --n-layer=2 --n-head=2 --n-embd=32"
LENGTH = "--batch-size=2 --grad-accum=2 --dropout=0.1 --log-every=5 --sample-tokens=5"
RATE = "--lr=1e-3 --schedule=constant --warmup-steps=10 --device=cpu --dtype=fp32"
# megabytes a minute that the memory of a rank may grow by, and seconds before it is measured
MAX_SLOPE, WARM_UP = 1.0, 60.0
# megabytes that it may grow by in the second half of a short run
MAX_GROWTH = 16.0
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


def slope(samples: list[tuple[float, float]]) -> float:
    """Megabytes a minute, of (seconds, megabytes), by least squares; 0 of fewer than ten."""
    if len(samples) < 10:
        return 0.0
    seconds, megabytes = np.array(samples).T
    return float(np.polyfit(seconds / 60, megabytes, 1)[0])


def soaked(
    whole: Job, job: Job, minutes: float, every: tuple[float, float], moments: random.Random
) -> dict[str, Any]:
    """Train for some time with kills, and beside it without.

    Args:
        whole: is never killed, and keeps all checkpoints.
        job: the same run; of its ranks one is killed again and again, and the others have to end.
        minutes: how long.
        every: the fewest and the most seconds from a start to its kill.
        moments: the randomness of the kills.

    Returns:
        The number of kills, the last step that was compared, whether it was the same, and the
        growth of the memory of the unbroken ranks.
    """
    began = time.monotonic()
    ending = began + minutes * 60
    kills = 0
    with whole.started() as unbroken:
        samples: dict[int, list[tuple[float, float]]] = {child: [] for child in unbroken}
        while time.monotonic() < ending:
            with job.started() as ranks:
                victim = moments.choice(ranks)
                until = min(time.monotonic() + moments.uniform(*every), ending)
                while time.monotonic() < until:
                    assert not ended(victim, 0.5), job.complaints()
                    if time.monotonic() - began > WARM_UP:
                        for child, places in samples.items():
                            places.append((time.monotonic(), resident(child)))
                kills += until < ending
                # the last one saves, and so does the unbroken run
                os.kill(victim, signal.SIGKILL if until < ending else signal.SIGTERM)
                assert all(ended(child, GRACE) for child in ranks)
        os.kill(unbroken[0], signal.SIGTERM)
        assert all(ended(child, GRACE) for child in unbroken)
    common = set(runs.saved_steps(job.run)) & set(runs.saved_steps(whole.run))
    last = max(common, default=0)
    return {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "seconds_between_kills": list(every),
        "kills": kills,
        "step": last,
        "different": not last or not is_same(job.run, whole.run, last),
        "megabytes_per_minute": [round(slope(places), 3) for places in samples.values()],
        "megabytes": [round(places[-1][1], 1) for places in samples.values() if places],
    }


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 0 if nothing was lost."""
    parser = Parser(prog="python -m tools.soak", description=__doc__)
    parser.add_argument("data", type=Path, help="a text")
    parser.add_argument("folder", type=Path, help="where the runs go; must not exist")
    parser.add_argument("--minutes", type=float, default=30.0, help="of kills [%(default)s]")
    parser.add_argument("--every", type=float, nargs=2, default=(20.0, 60.0), help="seconds")
    parser.add_argument("--kills", type=int, help="so many kills of short runs instead")
    parser.add_argument(
        "--life",
        type=float,
        help="of a killed start, seconds, at most [what the unbroken run takes]",
    )
    parser.add_argument("--ranks", type=int, help="[2; with --kills 1]")
    parser.add_argument("--shard", action="store_true", help="the ranks share the weights out")
    parser.add_argument("--steps", type=int, default=400, help="with --kills [%(default)s]")
    parser.add_argument("--eval-every", type=int, help="[200; with --kills 10]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [%(default)s]")
    options = parser.parse_args(argv)
    return run_command("soak", lambda: _body(options))


def _body(options: argparse.Namespace) -> int:
    options.folder.mkdir(parents=True)
    ranks = options.ranks or (2 if options.kills is None else 1)
    eval_every = options.eval_every or (200 if options.kills is None else 10)
    moments = random.Random(options.seed)
    short = options.kills is not None
    steps = f"--steps={options.steps if short else STEPS}"
    more = flags(f"--eval-every={eval_every}", steps, shard=options.shard)

    def job_in(name: str, keep: int) -> Job:
        begin = [*more, f"--keep-last={keep}"]
        return Job(options.folder / name, options.data, ranks, begin, next_flags)

    if short:
        record = killed(partial(job_in, keep=2), options.kills, moments, is_same, life=options.life)
        is_steady = record["megabytes"] < MAX_GROWTH
    else:
        jobs = job_in("whole", keep=1_000_000), job_in("killed", keep=2)
        record = soaked(*jobs, options.minutes, tuple(options.every), moments)
        is_steady = max(record["megabytes_per_minute"]) < MAX_SLOPE
    record |= {"ranks": ranks, "sharded": options.shard, "machine": machine(torch.device("cpu"))}
    said = json.dumps(record, indent=2)
    write_text(options.folder / "record.json", said + "\n")
    print(said)
    if record["different"]:
        raise UserError(f"{options.folder}: what was killed is not what the unbroken run is")
    if not is_steady:
        raise UserError(f"{options.folder}: the memory of the unbroken run has grown")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
