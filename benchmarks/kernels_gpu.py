"""``python -m benchmarks.kernels_gpu --out FOLDER``: every op against PyTorch's, on a GPU.

Outputs and gradients are held to the tests' error budget on the very inputs that are timed, before
anything is timed. Writes ``kernels.json`` and prints a table: median (20th-80th percentile),
bandwidth, FLOP rate, share of the roofline that this machine reached in the same run, and how much
longer than our kernel each rival takes. ``--dry`` runs everything once, tiny, on any machine.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.ops import Cost, Op, OpCase, op_cases
from benchmarks.timing import (
    ROUNDS,
    Ceilings,
    Clock,
    Timing,
    Work,
    as_json,
    machine,
    measure_ceilings,
)
from fastgpt2.files import write_text

FORWARD, BACKWARD, BOTH = "forward", "backward", "both"


@dataclass(frozen=True)
class Result:
    """One provider's time for one pass of one op."""

    op: str
    shape: str
    mode: str
    provider: str
    timing: Timing
    cost: Cost
    # of the fastest this machine can do it, 0 to 1
    roofline: float
    # how many times as long as our kernel
    versus_triton: float

    def as_json(self) -> dict[str, Any]:
        """Flat, with derived rates."""
        seconds = self.timing.median_us / 1e6
        return {
            "op": self.op,
            "shape": self.shape,
            "mode": self.mode,
            "provider": self.provider,
            **as_json(self.timing),
            "GB_per_s": self.cost.bytes / seconds / 1e9,
            "TFLOP_per_s": self.cost.flops / seconds / 1e12,
            "roofline": self.roofline,
            "versus_triton": self.versus_triton,
        }

    def row(self) -> str:
        """A line of the table."""
        t, seconds = self.timing, self.timing.median_us / 1e6
        return (
            f"{self.op:21} {self.shape:26} {self.mode:8} {self.provider:9} {t.median_us:9.1f} us "
            f"[{t.p20_us:.1f}, {t.p80_us:.1f}] {self.cost.bytes / seconds / 1e9:7.0f} GB/s "
            f"{self.cost.flops / seconds / 1e12:6.1f} TF/s {self.roofline:5.0%} "
            f"{self.versus_triton:5.2f}x"
        )


def _leaves(inputs: dict[str, Tensor], requires_grad: bool) -> dict[str, Tensor]:
    return {
        name: x.detach().clone().requires_grad_(requires_grad and x.is_floating_point())
        for name, x in inputs.items()
    }


def _outputs(run: Op, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    outputs = run(**leaves)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def works(case: OpCase, run: Op, inputs: dict[str, Tensor]) -> Iterator[tuple[str, Work]]:
    """(mode, what to time): forward without autograd; backward alone; both together."""
    plain = _leaves(inputs, False)

    def forward() -> None:
        with torch.no_grad():
            run(**plain)

    yield FORWARD, forward
    if case.backward is None:
        return
    leaves = _leaves(inputs, True)
    wanted = [x for x in leaves.values() if x.requires_grad]
    saved = _outputs(run, leaves)
    upstream = [torch.randn_like(y) for y in saved]

    def backward() -> None:
        torch.autograd.grad(saved, wanted, upstream, retain_graph=True)

    def both() -> None:
        torch.autograd.grad(_outputs(run, leaves), wanted, upstream)

    yield BACKWARD, backward
    yield BOTH, both


def check(case: OpCase, inputs: dict[str, Tensor]) -> None:
    """Our outputs and gradients are within the tests' budget on these inputs.

    Raises:
        AssertionError: they are not; says which and by how much.
    """
    from tests.kernels.budget import check_op

    check_op(case.run, inputs, backward=case.backward is not None, eager=case.checked_against)


def measure(
    case: OpCase,
    clock: Clock,
    ceilings: Ceilings,
    device: torch.device,
    *,
    seconds: float,
    compile: Callable[[Op], Op],
) -> list[Result]:
    """Check the case, then time every provider in every mode, alternating."""
    # the interpreter multiplies bf16 matrices wrongly
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = case.inputs(device, dtype)
    check(case, inputs)
    by_mode: dict[str, dict[str, Work]] = {}
    for provider, run in case.providers(compile).items():
        for mode, work in works(case, run, inputs):
            by_mode.setdefault(mode, {})[provider] = work
    costs = {FORWARD: case.forward}
    if case.backward is not None:
        costs |= {BACKWARD: case.backward, BOTH: case.forward + case.backward}
    results = []
    for mode, providers in by_mode.items():
        times = clock.compare(providers, seconds=seconds)
        least = ceilings.roofline_us(costs[mode].flops, costs[mode].bytes)
        ours = times["triton"].median_us
        results += [
            Result(
                case.op,
                case.shape,
                mode,
                provider,
                t,
                costs[mode],
                least / t.median_us,
                t.median_us / ours,
            )
            for provider, t in times.items()
        ]
    return results


def _compiler(dry: bool) -> Callable[[Op], Op]:
    if dry:
        return partial(torch.compile, backend="eager")
    # the backward pass is timed alone, several times on one graph
    torch._functorch.config.donated_buffer = False
    return partial(torch.compile, dynamic=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit code 1 if a kernel was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels_gpu")
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels.json")
    parser.add_argument("--op", action="append", help="only this op; repeatable")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing, for all together")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, any machine, no meaning")
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.dry else "cuda")
    torch.manual_seed(0)
    cases = [c for c in op_cases(options.dry) if not options.op or c.op in options.op]
    each = 0.0 if options.dry else options.seconds / (3 * len(cases) + 1)
    clock = Clock(device, rounds=1 if options.dry else ROUNDS)
    ceilings = measure_ceilings(clock, device, seconds=each)
    results: list[Result] = []
    wrong: dict[str, str] = {}
    for case in (bar := tqdm(cases, unit="op", file=sys.stderr)):
        bar.set_postfix_str(case.label)
        try:
            results += measure(
                case, clock, ceilings, device, seconds=each, compile=_compiler(options.dry)
            )
        except AssertionError as error:
            # a wrong kernel has no speed; the others still have theirs
            wrong[case.label] = str(error)
    report = {
        "machine": machine(device),
        "ceilings": {"GB_per_s": ceilings.bandwidth / 1e9, "TFLOP_per_s": ceilings.flops / 1e12},
        "results": [result.as_json() for result in results],
        "wrong": wrong,
    }
    write_text(options.out / "kernels.json", json.dumps(report, indent=1) + "\n")
    print("\n".join(result.row() for result in results))
    print("\n".join(f"WRONG {label}: {error}" for label, error in wrong.items()))
    print(f"copy {ceilings.bandwidth / 1e9:.0f} GB/s, matmul {ceilings.flops / 1e12:.0f} TFLOP/s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
