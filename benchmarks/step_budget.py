"""``python -m benchmarks.step_budget``: where the time of a training step on a CPU goes.

Each contender of ``bench_train_step`` runs in processes of its own, by turns, so that its memory
allocator is its own: ours keeps freed memory, as the training command does, and once more does not
(``plain malloc``). A process times a few steps, then profiles one and adds up the time of each
operator by what it is for. Prints a table of milliseconds, writes JSON.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.bench_train_step import TrainStep, workloads
from benchmarks.harness import Scale, Settings
from benchmarks.machine import machine
from fastgpt2.files import write_text
from fastgpt2.training.allocator import keep_freed_memory
from fastgpt2.training.summary import dtype_name

PLAIN_MALLOC = " plain malloc"
CONTENDERS = (
    "fastgpt2",
    "fastgpt2 compiled",
    f"fastgpt2 compiled{PLAIN_MALLOC}",
    "nanogpt",
    "nanogpt compiled",
    "transformers compiled",
)
# an operator counts for the first part in this list of which it, or one that called it, has a name
PARTS = {
    "attention": ("attention",),
    "matmul": ("aten::mm", "aten::addmm"),
    "loss": ("linear_cross_entropy", "cross_entropy", "nll_loss", "softmax"),
    "compiled pointwise": ("CompiledFxGraph",),
    "optimizer": ("Optimizer", "adamw", "linalg_vector_norm"),
    "GELU, LayerNorm": ("gelu", "layer_norm"),
    "copies, casts, fills": ("copy_", "fill_", "aten::cat"),
}
REST = "everything else"


def part_of(names: Sequence[str]) -> str:
    """The part of a step that an operator belongs to, given its name and those of its callers."""
    for part, words in PARTS.items():
        # a compiled graph is the caller of all that it calls, and only its own code is pointwise
        candidates = names[:1] if part in ("matmul", "compiled pointwise") else names
        if any(word in name for word in words for name in candidates):
            return part
    return REST


def milliseconds(events: Any) -> dict[str, float]:
    """The time of each part, children not counted, of a profile's events."""
    total: dict[str, float] = defaultdict(float)
    for event in events:
        names, caller = [event.name], event.cpu_parent
        while caller is not None:
            names.append(caller.name)
            caller = caller.cpu_parent
        total[part_of(names)] += event.self_cpu_time_total / 1e3
    return dict(total)


def measure(name: str, dtype: str, steps: int, scale: Scale) -> dict[str, Any]:
    """One contender, in this process."""
    if name.startswith("fastgpt2") and not name.endswith(PLAIN_MALLOC):
        keep_freed_memory()
    (workload,) = (w for w in workloads(scale) if dtype_name(w.dtype) == dtype)
    settings = Settings(scale, torch.device("cpu"), rounds=1, seconds=0.0, budget=0.0, memory=False)
    contender = name.removesuffix(PLAIN_MALLOC)
    step = TrainStep(workload, (contender,)).step(contender, settings)
    # compiling, and memory that is had for the first time
    step(), step()
    seconds = []
    for _ in range(steps):
        start = perf_counter()
        step()
        seconds.append(perf_counter() - start)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    return {
        "name": name,
        "tokens": workload.B * workload.T,
        "seconds": seconds,
        "parts_ms": milliseconds(profiler.events()),
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Medians over the processes of each contender."""
    lines = [f"{'':34} {'step':>8} {'tok/s':>7}  " + "  ".join([*PARTS, REST])]
    for name in dict.fromkeys(run["name"] for run in runs):
        own = [run for run in runs if run["name"] == name]
        seconds = median(second for run in own for second in run["seconds"])
        parts = [
            f"{median(run['parts_ms'].get(part, 0.0) for run in own):{len(part)}.0f}"
            for part in (*PARTS, REST)
        ]
        rate = own[0]["tokens"] / seconds
        lines.append(f"{name:34} {seconds * 1e3:5.0f} ms {rate:7.1f}  " + "  ".join(parts))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_budget")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON to write")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--turns", type=int, default=2, help="processes of each contender")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each process")
    parser.add_argument("--scale", type=Scale, default=Scale.CPU, choices=list(Scale))
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, metavar="NAME")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(options.one, options.dtype, options.steps, options.scale)))
        return 0
    own = ["--dtype", options.dtype, "--steps", str(options.steps), "--scale", options.scale]
    runs: list[dict[str, Any]] = []
    for name in tqdm([name for _ in range(options.turns) for name in options.contenders]):
        command = [sys.executable, "-m", "benchmarks.step_budget", "--out", "-", "--one", name]
        done = subprocess.run([*command, *own], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: {done.stderr}", file=sys.stderr)
            return 1
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        report = {"machine": machine(torch.device("cpu")), "dtype": options.dtype, "runs": runs}
        write_text(options.out, json.dumps(report, indent=1) + "\n")
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
