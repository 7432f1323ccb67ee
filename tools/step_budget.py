"""``python -m tools.step_budget``: where the time of a training step on a CPU goes.

The contenders of ``bench_train_step`` alternate, each in its own processes, so that they do not
share a memory allocator. Ours keeps freed memory, as the training command does; ``plain malloc``
does not. A process times a few steps, then profiles one and sums the operators' times by their
purpose. Prints a table of milliseconds and peak resident sets, and writes JSON.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.bench_train_step import Workload, lone_step, peak_resident, workloads
from benchmarks.harness import Scale
from benchmarks.processes import ask, write_runs
from fastgpt2.cli import Parser, check_counts
from fastgpt2.cli import run as run_command
from fastgpt2.errors import UserError
from fastgpt2.train.allocator import keep_freed_memory
from fastgpt2.train.summary import dtype_name

PLAIN_MALLOC = " plain malloc"
CONTENDERS = (
    "fastgpt2",
    "fastgpt2 compiled",
    f"fastgpt2 compiled{PLAIN_MALLOC}",
    "nanogpt",
    "nanogpt compiled",
    "transformers compiled",
)
# an operator counts for the first part in this list whose names it, or a caller of it, has
PARTS = {
    "attention": ("attention",),
    "matmul": ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"),
    "loss": ("linear_cross_entropy", "cross_entropy", "nll_loss", "softmax"),
    "compiled pointwise": ("CompiledFxGraph",),
    "optimizer": ("Optimizer", "adamw", "linalg_vector_norm"),
    "GELU, LayerNorm": ("gelu", "layer_norm"),
    "copies, casts, fills": ("copy_", "fill_", "aten::cat"),
}
REST = "everything else"


def part_of(names: Sequence[str]) -> str:
    """The part of a step that an operator belongs to, from its name and its callers' names."""
    for part, words in PARTS.items():
        # of a compiled graph only its own code is pointwise, not the operators that it calls
        candidates = names[:1] if part in ("matmul", "compiled pointwise") else names
        if any(word in name for word in words for name in candidates):
            return part
    return REST


def milliseconds(events: Any) -> dict[str, float]:
    """The time of each part, without children, from a profile's events."""
    total: dict[str, float] = defaultdict(float)
    for event in events:
        names, caller = [event.name], event.cpu_parent
        while caller is not None:
            names.append(caller.name)
            caller = caller.cpu_parent
        total[part_of(names)] += event.self_cpu_time_total / 1e3
    return dict(total)


def chosen_workload(scale: Scale, dtype: str) -> Workload:
    """The workload of that scale and dtype.

    Raises:
        UserError: there is none.
    """
    found = {dtype_name(w.dtype): w for w in workloads(scale)}
    if dtype not in found:
        raise UserError(f"--dtype {dtype}: at scale {scale} there is only {', '.join(found)}")
    return found[dtype]


def measure(name: str, dtype: str, steps: int, scale: Scale) -> dict[str, Any]:
    """One contender, in this process."""
    if name.startswith("fastgpt2") and not name.endswith(PLAIN_MALLOC):
        keep_freed_memory()
    workload = chosen_workload(scale, dtype)
    step = lone_step(scale, workload, name.removesuffix(PLAIN_MALLOC))
    # warm up: compile, and allocate memory for the first time
    step(), step()
    seconds = []
    for _ in range(steps):
        start = perf_counter()
        step()
        seconds.append(perf_counter() - start)
    # before the profiler, whose records need memory too
    peak_bytes = peak_resident()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    return {
        "name": name,
        "tokens": workload.B * workload.T,
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "parts_ms": milliseconds(profiler.events()),
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Medians over the processes of each contender."""
    lines = [f"{'':34} {'step':>8} {'tok/s':>7} {'peak':>7}  " + "  ".join([*PARTS, REST])]
    for name in dict.fromkeys(run["name"] for run in runs):
        own = [run for run in runs if run["name"] == name]
        seconds = median(second for run in own for second in run["seconds"])
        parts = [
            f"{median(run['parts_ms'].get(part, 0.0) for run in own):{len(part)}.0f}"
            for part in (*PARTS, REST)
        ]
        rate = own[0]["tokens"] / seconds
        peak = median(run["peak_bytes"] for run in own) / 1e9
        lines.append(
            f"{name:34} {seconds * 1e3:5.0f} ms {rate:7.1f} {peak:4.2f} GB  " + "  ".join(parts)
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(prog="python -m tools.step_budget")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON to write")
    parser.add_argument(
        "--dtype", default="bf16", choices=("bf16", "fp32"), help="compute dtype [%(default)s]"
    )
    parser.add_argument(
        "--turns", type=int, default=2, help="processes per contender [%(default)s]"
    )
    parser.add_argument(
        "--steps", type=int, default=4, help="timed steps per process [%(default)s]"
    )
    parser.add_argument(
        "--scale", type=Scale, default=Scale.CPU, choices=list(Scale), help="sizes [%(default)s]"
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=CONTENDERS,
        choices=CONTENDERS,
        metavar="NAME",
        help=f"which to time [{', '.join(CONTENDERS)}]",
    )
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    return run_command("step_budget", lambda: _body(options), steady=options.one is None)


def _body(options: argparse.Namespace) -> int:
    if options.one:
        print(json.dumps(measure(options.one, options.dtype, options.steps, options.scale)))
        return 0
    check_counts(options, "turns", "steps")
    # check before the first process, which starts slowly
    chosen_workload(options.scale, options.dtype)
    own = ["--dtype", options.dtype, "--steps", str(options.steps), "--scale", options.scale]
    runs: list[dict[str, Any]] = []
    for name in tqdm([name for _ in range(options.turns) for name in options.contenders]):
        command = [sys.executable, "-m", "tools.step_budget", "--out", "-", "--one", name]
        run = ask(name, [*command, *own])
        if run is None:
            return 1
        runs.append(run)
        write_runs(options.out, options.dtype, runs)
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
