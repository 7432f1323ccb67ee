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


class Bench:
    """Checks and times cases and keeps what came of each: a wrong kernel does not stop the rest."""

    def __init__(self, device: torch.device, *, seconds: float, dry: bool) -> None:
        self.device, self.seconds = device, seconds
        self.clock = Clock(device, rounds=1 if dry else ROUNDS)
        self.compile = _compiler(dry)
        self.ceilings = measure_ceilings(self.clock, device, seconds=seconds)
        self.results: list[Result] = []
        self.wrong: dict[str, str] = {}
        self.notes: list[str] = []

    def run(self, case: OpCase) -> None:
        """Check the case, then time every provider in every mode, alternating."""
        # the interpreter multiplies bf16 matrices wrongly
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        # one op's function is compiled anew for each size: beyond a limit it would run uncompiled
        torch.compiler.reset()
        try:
            inputs = case.inputs(self.device, dtype)
            check(case, inputs)
            by_mode = self._prepare(case, inputs)
        except torch.OutOfMemoryError:
            self.notes.append(f"{case.label}: not run, too little memory")
        except Exception as error:
            # whatever it is, it is ours, and has no speed
            self.wrong[case.label] = f"{type(error).__name__}: {error}"
        else:
            self._time(case, by_mode)

    def _prepare(self, case: OpCase, inputs: dict[str, Tensor]) -> dict[str, dict[str, Work]]:
        """mode -> provider -> what to time; a rival that cannot do it is noted and left out."""
        by_mode: dict[str, dict[str, Work]] = {}
        for provider, run in case.providers(self.compile).items():
            try:
                prepared = dict(works(case, run, inputs))
                for work in prepared.values():
                    work()
            except Exception as error:
                if provider == "triton":
                    raise
                self.notes.append(f"{case.label}: {provider} cannot: {str(error).splitlines()[0]}")
                continue
            for mode, work in prepared.items():
                by_mode.setdefault(mode, {})[provider] = work
        return by_mode

    def _time(self, case: OpCase, by_mode: dict[str, dict[str, Work]]) -> None:
        costs = {FORWARD: case.forward}
        if case.backward is not None:
            costs |= {BACKWARD: case.backward, BOTH: case.forward + case.backward}
        for mode, providers in by_mode.items():
            times, cost = self.clock.compare(providers, seconds=self.seconds), costs[mode]
            least = self.ceilings.roofline_us(cost.flops, cost.bytes)
            ours = times["triton"].median_us
            for provider, t in times.items():
                share, ratio = least / t.median_us, t.median_us / ours
                self.results.append(
                    Result(case.op, case.shape, mode, provider, t, cost, share, ratio)
                )

    def as_json(self) -> dict[str, Any]:
        """Everything so far."""
        rates = {
            "GB_per_s": self.ceilings.bandwidth / 1e9,
            "TFLOP_per_s": self.ceilings.flops["bf16"] / 1e12,
        }
        return {
            "machine": machine(self.device),
            "ceilings": rates,
            "results": [result.as_json() for result in self.results],
            "wrong": self.wrong,
            "notes": self.notes,
        }


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
    bench = Bench(device, seconds=each, dry=options.dry)
    for case in (bar := tqdm(cases, unit="op", file=sys.stderr)):
        bar.set_postfix_str(case.label)
        first = len(bench.results)
        bench.run(case)
        # printed and written at once: a run that is cut short has something to show
        tqdm.write("\n".join(result.row() for result in bench.results[first:]), sys.stdout)
        write_text(options.out / "kernels.json", json.dumps(bench.as_json(), indent=1) + "\n")
    faults = [f"WRONG {label}: {error}" for label, error in bench.wrong.items()]
    print("\n".join([*bench.notes, *faults]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
