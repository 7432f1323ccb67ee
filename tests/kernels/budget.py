"""Error budgets that are computed, not chosen, and the shape grids that all kernel tests share.

Gold is the reference in fp64 on the very inputs that the kernel gets. An implementation may err at
most twice as much as eager PyTorch in the same dtype, plus a few roundings of the output dtype:
twice in the largest error and twice in the root mean square, for outputs and for gradients.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import quicken

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")

if INTERPRETED:
    # whoever checks a kernel runs it often
    quicken()

# the full grids, for a GPU; each test takes a small half of its own for the interpreter
ROWS = (1, 3, 127, 129, 1023)
WIDTHS = (1, 63, 768, 1024, 1280, 1600)
LENGTHS = (1, 63, 65, 1000, 1024)
HEAD_SIZES = (64, 32, 80, 128)
# the interpreter computes bf16 dots wrongly, a GPU does all three
INTERPRETED_DTYPES = (torch.float32, torch.float16)
DTYPES = (*INTERPRETED_DTYPES, torch.bfloat16)

Outputs = Tensor | Sequence[Tensor]
# an op under test: implementation's name and named inputs in, output or outputs out
Op = Callable[..., Outputs]


def on_gpu(*values: Any) -> Any:
    """One parameter set of a full grid: runs on a GPU only."""
    return pytest.param(*values, marks=pytest.mark.gpu)


def grid(small: Iterable[Any], full: Iterable[Any]) -> list[Any]:
    """Parameters for ``pytest.mark.parametrize``: ``small`` everywhere, the rest on a GPU only."""
    here = list(small)
    return [*here, *(on_gpu(value) for value in full if value not in here)]


# a test at a size that only a GPU can take is given ``full=True`` there, and rehearsed everywhere
# with few and small tensors: none of its lines runs for the first time on the GPU
rehearsed = pytest.mark.parametrize("full", [False, on_gpu(True)], ids=["rehearsal", "full"])
# what tensor cores multiply in such a test, and what the interpreter can
HALF = torch.float16 if DEVICE.type == "cpu" else torch.bfloat16


def dtype_grid() -> list[Any]:
    """fp32 and fp16 everywhere, bf16 on a GPU."""
    return grid(INTERPRETED_DTYPES, DTYPES)


def assert_within_budget(
    name: str,
    actual: Tensor,
    eager: Tensor,
    gold: Tensor,
    *,
    roundings: float = 2.0,
    precision: torch.dtype | None = None,
) -> None:
    """``actual`` errs at most twice as much as ``eager`` plus ``roundings``.

    A rounding is one of ``precision``, of its own dtype if None.
    """
    assert actual.shape == gold.shape, f"{name}: shape {actual.shape}, expected {gold.shape}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, eager has {eager.dtype}"
    if gold.numel() == 0:
        return
    # FP8 has no operators of its own
    gold, finite = gold.double(), actual.double().isfinite()
    assert finite.all(), f"{name}: {int((~finite).sum())} values not finite"
    error, eager_error = (actual.double() - gold).abs(), (eager.double() - gold).abs()
    rounding = roundings * torch.finfo(precision or actual.dtype).eps / 2
    # where terms cancel, a rounding is one of the terms: of the tensor's typical size
    typical = float(gold.square().mean().sqrt())
    limit = 2.0 * eager_error.max() + rounding * (gold.abs() + typical)
    worst = int((error - limit).argmax())
    assert (error <= limit).all(), (
        f"{name}: got {actual.flatten()[worst]:.9g} at flat index {worst}, gold "
        f"{gold.flatten()[worst]:.9g}; error {error.flatten()[worst]:.3g} over the budget "
        f"{limit.flatten()[worst]:.3g} (eager errs {eager_error.max():.3g})"
    )
    rms, eager_rms = (float(e.square().mean().sqrt()) for e in (error, eager_error))
    rms_limit = 2.0 * eager_rms + rounding * typical
    assert rms <= rms_limit, (
        f"{name}: rms error {rms:.3g} over the budget {rms_limit:.3g} (eager errs {eager_rms:.3g})"
    )


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    """One output or several, as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def run_with_gradients(
    op: Op, impl: str, inputs: Mapping[str, Tensor], upstream: Sequence[Tensor] | None
) -> dict[str, Tensor]:
    """Outputs ``y0, y1, ...`` and, given ``upstream`` gradients, ``d<input>`` of every float input.

    The upstream gradients are cast to each output's dtype.
    """
    # not cloned: a copy of a strided view has no strides
    leaves = {
        name: x.detach().requires_grad_(upstream is not None and x.is_floating_point())
        for name, x in inputs.items()
    }
    outputs = as_tuple(op(impl, **leaves))
    results = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    if upstream is None:
        return results
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    dys = [dy.to(y.dtype) for y, dy in zip(outputs, upstream, strict=True)]
    gradients = torch.autograd.grad(outputs, list(wanted.values()), dys)
    return results | {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}


def draw_upstream(op: Op, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Random gradients of the outputs, already rounded to the outputs' dtypes, in fp64."""
    with torch.no_grad():
        outputs = as_tuple(op("torch", **inputs))
    return [torch.randn_like(y, dtype=torch.float64).to(y.dtype).double() for y in outputs]


def check_op(
    op: Op,
    inputs: Mapping[str, Tensor],
    *,
    impl: str = "triton",
    backward: bool = True,
    roundings: float = 2.0,
    precision: torch.dtype | None = None,
    eager: str = "torch",
) -> None:
    """Outputs and every gradient of ``op(impl, **inputs)`` are within budget, inputs unchanged.

    Gold is ``op("reference", ...)`` on the same inputs in fp64; integer inputs pass as they are.
    """
    before = {name: x.clone() for name, x in inputs.items()}
    upstream = draw_upstream(op, inputs) if backward else None
    actual = run_with_gradients(op, impl, inputs, upstream)
    for name, x in inputs.items():
        assert torch.equal(x, before[name]), f"{name} was written to"
    eager_results = run_with_gradients(op, eager, inputs, upstream)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    gold = run_with_gradients(op, "reference", wide, upstream)
    for name, value in actual.items():
        assert_within_budget(
            name,
            value,
            eager_results[name],
            gold[name],
            roundings=roundings,
            precision=precision,
        )


def assert_repeatable(
    op: Op, inputs: Mapping[str, Tensor], *, impl: str = "triton", times: int = 2
) -> None:
    """The same inputs give the same bits, outputs and gradients."""
    upstream = draw_upstream(op, inputs)
    first = run_with_gradients(op, impl, inputs, upstream)
    for _ in range(times - 1):
        for name, value in run_with_gradients(op, impl, inputs, upstream).items():
            assert torch.equal(value, first[name]), f"{name} differs between two runs"
