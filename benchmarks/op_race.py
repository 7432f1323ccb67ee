"""One op at one size: our implementation and PyTorch's, forward, backward and both, alternating.

Before anything is timed, outputs and gradients of every provider must meet the tests' error budget
on the timed inputs. Providers: ``triton``, our kernels; ``torch``, ours on PyTorch's operators, as
on a CPU; ``torch-compiled``, the same inside ``torch.compile``; ``eager``, PyTorch's own functions;
``compile``, those compiled; on a GPU, SDPA's backends by name.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Race, Scale, Settings, compute_dtype
from benchmarks.op_case import BACKWARD, BOTH, FORWARD, OpCase
from benchmarks.ops import op_cases
from benchmarks.timing import Ceilings, Work
from fastgpt2.compiler import compiler_obstacle
from fastgpt2.kernels import backend
from fastgpt2.train.summary import dtype_name

Run = Callable[..., Any]
# a dry run compiles this op only: tracing all of them takes most of its time, and each op's own
# tests trace it
DRY_COMPILED_OP = "layer_norm"


class Judge:
    """Checks outputs and gradients of a case against the budget; the gold is computed once."""

    def __init__(self, case: OpCase, inputs: Mapping[str, Tensor]) -> None:
        from tests.kernels import budget

        self.budget, self.case, self.inputs = budget, case, inputs
        has_backward = case.backward is not None
        self.upstream = budget.draw_upstream(case.run, inputs) if has_backward else None
        wide = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
        reference = partial(case.run, "reference")
        self.gold = self._results(reference, wide)
        # its error in the same dtype sets the budget
        self.eager = self._results(reference if case.random else case.plain, inputs)

    def _results(self, run: Run, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        def op(_impl: str, **leaves: Tensor) -> Any:
            return run(**leaves)

        return self.budget.run_with_gradients(op, "", inputs, self.upstream)

    def check(self, run: Run) -> None:
        """Raise AssertionError if the results of ``run`` exceed the budget; it says by how much."""
        for name, value in self._results(run, self.inputs).items():
            self.budget.assert_within_budget(name, value, self.eager[name], self.gold[name])


def _leaves(inputs: Mapping[str, Tensor], requires_grad: bool) -> dict[str, Tensor]:
    return {
        name: x.detach().clone().requires_grad_(requires_grad and x.is_floating_point())
        for name, x in inputs.items()
    }


def _outputs(run: Run, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    outputs = run(**leaves)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def works(case: OpCase, run: Run, inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, Work]]:
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


class OpRace(Race):
    """All providers of a case, in all modes, alternating."""

    head_start = True

    def __init__(self, case: OpCase, scale: Scale) -> None:
        self.case, self.dtype = case, compute_dtype(scale)
        self.group = f"{case.label} {dtype_name(self.dtype)}"
        providers = {
            Scale.CUDA: ("triton", "eager", "compile", *case.backends),
            # each provider is listed; one that cannot run says why
            Scale.CPU: ("torch", "torch-compiled", "triton", "eager", "compile"),
            Scale.DRY: ("triton", "torch", "torch-compiled", "eager", "compile"),
        }[scale]
        self.contenders = tuple(f"{p} {mode}" for p in providers for mode in case.modes)
        self._judge: Judge | None = None
        self._works: dict[str, dict[str, Work]] = {}

    def _run(self, provider: str, settings: Settings) -> Run:
        case = self.case
        match provider:
            case "triton":
                if backend.INTERPRETED and settings.scale is not Scale.DRY:
                    pytest.skip("triton is interpreted here: no speed of its own")
                try:
                    backend.resolve(
                        case.op,
                        provider,
                        torch.empty(0, dtype=self.dtype, device=settings.device),
                    )
                except RuntimeError as obstacle:
                    pytest.skip(str(obstacle))
                return partial(case.run, provider)
            case "torch":
                return partial(case.run, provider)
            case "eager":
                return case.plain
            case "torch-compiled":
                return self._compiled(partial(case.run, "torch"), settings)
            case "compile":
                return self._compiled(case.plain, settings)
        context = case.backends[provider]

        def within(**inputs: Tensor) -> Any:
            with context():
                return case.plain(**inputs)

        return within

    def _compiled(self, run: Run, settings: Settings) -> Run:
        obstacle = compiler_obstacle(settings.device)
        if obstacle is not None:
            pytest.skip(f"torch.compile: {obstacle}")
        if settings.scale is Scale.DRY:
            return torch.compile(run, backend="eager") if self.case.op == DRY_COMPILED_OP else run
        from torch._functorch import config as functorch_config

        # the backward pass is timed alone, several times on the same graph
        functorch_config.donated_buffer = False
        return torch.compile(run, dynamic=False)

    def prepare(self, name: str, settings: Settings) -> Work:
        """One provider's pass, after its outputs and gradients met the budget."""
        provider, _, mode = name.partition(" ")
        if provider not in self._works:
            self._works[provider] = self._prepare(self._run(provider, settings), provider, settings)
        work = self._works[provider][mode]
        work()
        return work

    def _prepare(self, run: Run, provider: str, settings: Settings) -> dict[str, Work]:
        if self._judge is None:
            inputs = self.case.inputs(settings.device, self.dtype)
            self._judge = Judge(self.case, inputs)
        if self.is_ours(provider) or not self.case.random:
            self._judge.check(run)
        return dict(works(self.case, run, self._judge.inputs))

    def facts(self, name: str, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
        """Bytes, FLOPs, their rates, and the share of the roofline that this machine reached."""
        provider, _, mode = name.partition(" ")
        cost, dtype = self.case.cost(mode), dtype_name(self.dtype)
        return {
            "op": self.case.op,
            "shape": self.case.shape,
            "dtype": dtype,
            "provider": provider,
            "form": "compiled" if provider in ("torch-compiled", "compile") else "eager",
            "mode": mode,
            "bytes": cost.bytes,
            "flops": cost.flops,
            "GB_per_s": cost.bytes / seconds / 1e9,
            "TFLOP_per_s": cost.flops / seconds / 1e12,
            "roofline": ceilings.roofline(cost.flops, cost.bytes, dtype) / seconds,
        }

    def is_ours(self, name: str) -> bool:
        """The kernels, and our ops on PyTorch's operators."""
        return name.split()[0] in ("triton", "torch", "torch-compiled")

    def close(self) -> None:
        """Free inputs, graphs and gold after the race."""
        self._judge = None
        self._works.clear()


def op_races(settings: Settings) -> list[Race]:
    """A race for every op and size."""
    return [OpRace(case, settings.scale) for case in op_cases(settings.scale)]
