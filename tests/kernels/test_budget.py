"""The budget itself: it passes what is right and rejects what is not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels.layer_norm import layer_norm
from tests.kernels import budget
from tests.kernels.layouts import LAYOUTS, lay_out

# not written out, so that this file does not find itself
MARK = ".".join(("@pytest", "mark", "gpu"))


def test_no_test_is_for_a_gpu_alone() -> None:
    """``budget.grid`` and ``budget.rehearsed`` give every test of the full size a small twin."""
    for path in Path(__file__).parent.glob("test_*.py"):
        marks = [line for line in path.read_text(encoding="utf-8").splitlines() if MARK in line]
        assert not marks, f"{path.name} has tests that nothing has run before a GPU does"


def _inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "x": torch.randn(7, 65, device=budget.DEVICE).to(dtype),
        "weight": torch.randn(65, device=budget.DEVICE).to(dtype),
        "bias": torch.randn(65, device=budget.DEVICE).to(dtype),
    }


def _altered(alter: Callable[..., Tensor]) -> budget.Op:
    def op(impl: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if impl == "broken":
            return alter(x, weight, bias)
        return layer_norm(x, weight, bias, impl=impl)

    return op


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_right_implementations_pass(dtype: torch.dtype, impl: str) -> None:
    budget.check_op(_altered(torch.empty_like), _inputs(dtype), impl=impl)


WRONG: dict[str, Callable[..., Tensor]] = {
    "y0": lambda x, w, b: layer_norm(x, w, b, eps=1e-2, impl="torch"),
    "dx": lambda x, w, b: layer_norm(x.detach() + 0.9 * (x - x.detach()), w, b, impl="torch"),
    "dweight": lambda x, w, b: layer_norm(x, 2 * w - w.detach(), b, impl="torch"),
    "dbias": lambda x, w, b: layer_norm(x, w, b.detach() + 1.01 * (b - b.detach()), impl="torch"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_outputs_and_gradients_are_rejected(what: str) -> None:
    with pytest.raises(AssertionError, match=f"{what}: "):
        budget.check_op(_altered(WRONG[what]), _inputs(torch.float32), impl="broken")


def test_statistics_in_a_short_dtype_are_rejected() -> None:
    def short(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        rstd = (x - mean).square().mean(-1, keepdim=True).add(1e-5).rsqrt()
        return (x - mean) * rstd * weight + bias

    inputs = _inputs(torch.bfloat16)
    inputs["x"] += 8.0
    budget.check_op(_altered(short), inputs, impl="torch")
    with pytest.raises(AssertionError, match="over the budget"):
        budget.check_op(_altered(short), inputs, impl="broken")


def test_written_inputs_are_rejected() -> None:
    def in_place(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        inputs["x"].zero_()
        return layer_norm(x, weight, bias, impl="torch")

    inputs = _inputs(torch.float32)
    with pytest.raises(AssertionError, match="x was written to"):
        budget.check_op(_altered(in_place), inputs, impl="broken")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_op_gets_its_inputs_as_they_are_laid_out(layout: str) -> None:
    x = lay_out(torch.randn(6, 40), layout)
    strides: list[tuple[int, ...]] = []

    def op(impl: str, x: Tensor) -> Tensor:
        strides.append(x.stride())
        return 2.0 * x

    found = budget.run_with_gradients(op, "torch", {"x": x}, [torch.ones(6, 40)])
    assert strides == [x.stride()]
    assert torch.equal(found["dx"], torch.full((6, 40), 2.0)) and not x.requires_grad


def test_runs_that_differ_are_rejected() -> None:
    noisy = _altered(lambda x, w, b: layer_norm(x, w, b, impl="torch") + 1e-6 * torch.rand(7, 65))
    with pytest.raises(AssertionError, match="differs between two runs"):
        budget.assert_repeatable(noisy, _inputs(torch.float32), impl="broken")


def test_fresh_memory_is_nan() -> None:
    x = torch.ones(3, device=budget.DEVICE)
    fresh = (torch.empty(3, device=budget.DEVICE), torch.empty_like(x), x.new_empty(4))
    assert all(bool(memory.isnan().all()) for memory in fresh)
