"""The residual addition that ends a block: every implementation against fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels import philox, tuning
from fastgpt2.kernels.add_branch import _add_branch_bwd, _add_branch_fwd, add_branch
from tests.kernels import budget
from tests.kernels.budget import DEVICE
from tests.kernels.graphs import assert_compiles_whole, assert_graph_replays
from tests.kernels.layouts import LAYOUTS, lay_out

SHAPES = budget.grid(
    [(1, 63), (3, 768), (129, 1), (37, 80)],
    [(N, C) for N in budget.ROWS for C in (*budget.WIDTHS, 4096)],
)
SEED = 2**40 + 7


def _inputs(
    N: int, C: int, dtype: torch.dtype, stream: torch.dtype | None = None
) -> dict[str, Tensor]:
    return {
        "x": torch.randn(N, C, device=DEVICE).to(stream or dtype),
        "branch": torch.randn(N, C, device=DEVICE).to(dtype),
        "branch_bias": torch.randn(C, device=DEVICE).to(dtype),
    }


def _op(dropout_p: float = 0.0) -> Callable[..., Tensor]:
    def op(impl: str, x: Tensor, branch: Tensor, branch_bias: Tensor | None = None) -> Tensor:
        return add_branch(x, branch, branch_bias, dropout_p=dropout_p, seed=SEED, impl=impl)

    return op


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_budget(shape: tuple[int, int], dtype: torch.dtype, dropout_p: float) -> None:
    inputs = _inputs(*shape, dtype)
    budget.check_op(_op(dropout_p), inputs)
    budget.check_op(_op(dropout_p), {name: inputs[name] for name in ("x", "branch")})


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_other_implementations_are_within_budget(impl: str, dropout_p: float) -> None:
    # each is the other's measure
    eager = "reference" if impl == "torch" else "torch"
    inputs = _inputs(17, 96, torch.float32)
    budget.check_op(_op(dropout_p), inputs, impl=impl, eager=eager)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_fp32_stream_with_a_short_branch(impl: str, dropout_p: float) -> None:
    inputs = _inputs(13, 96, torch.float16, torch.float32)
    budget.check_op(_op(dropout_p), inputs, impl=impl)


def test_bias_keeps_its_own_dtype() -> None:
    inputs = _inputs(7, 64, torch.float16)
    inputs["branch_bias"] = inputs["branch_bias"].float()
    budget.check_op(_op(), inputs, eager="reference")


def test_bias_gradient_is_summed_in_fp32() -> None:
    inputs = _inputs(4096, 3, torch.float16)
    # in fp32, so that the gradient shows every bit that a program's sum has lost
    bias = inputs["branch_bias"].float().requires_grad_()
    y = add_branch(inputs["x"], inputs["branch"], bias, impl="triton")
    # fp16 holds each of these numbers, but few sums of them
    dy = (1.0 + torch.arange(4096, device=DEVICE) % 7 / 1024.0)[:, None].expand(4096, 3)
    (dbias,) = torch.autograd.grad(y, bias, dy.half())
    assert torch.equal(dbias.double(), dy.double().sum(0))


def test_without_dropout_one_gradient_serves_x_and_branch() -> None:
    leaves = [t.requires_grad_() for t in _inputs(5, 24, torch.float32).values()]
    dy = torch.randn(5, 24, device=DEVICE)
    dx, dbranch, _ = torch.autograd.grad(add_branch(*leaves, impl="triton"), leaves, dy)
    assert dx.data_ptr() == dbranch.data_ptr() == dy.data_ptr()


def test_mask_is_the_reference_s_bit_for_bit() -> None:
    inputs = _inputs(33, 65, torch.float16)
    inputs["x"].zero_()
    results = [_op(0.4)(impl, **inputs) for impl in ("triton", "reference", "torch")]
    assert torch.equal(results[0], results[1])
    keep = philox.keep_mask(torch.tensor(SEED, device=DEVICE), (33, 65), 0.4)
    for y in results:
        assert torch.equal(y != 0, keep)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_and_gradients(layout: str) -> None:
    inputs = _inputs(6, 40, torch.float32)
    dy = torch.randn(6, 40, device=DEVICE)
    expected = budget.run_with_gradients(_op(0.2), "triton", inputs, [dy])
    given = inputs | {name: lay_out(inputs[name], layout) for name in ("x", "branch")}
    given["branch_bias"] = lay_out(inputs["branch_bias"], "columns with a stride")
    found = budget.run_with_gradients(_op(0.2), "triton", given, [lay_out(dy, layout)])
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty_batch(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    bias = torch.ones(8, device=DEVICE, requires_grad=True)
    y = add_branch(x, x, bias, dropout_p=0.5, impl="triton")
    dx, dbias = torch.autograd.grad(y, (x, bias), torch.empty_like(y))
    assert y.shape == dx.shape == shape
    assert dbias.shape == (8,) and not dbias.any()


def test_every_config_sums_alike() -> None:
    # whole numbers: the sums are exact in any order
    inputs = {n: t.round() for n, t in _inputs(37, 80, torch.float32).items()}
    dy = torch.randint(-8, 9, (37, 80), device=DEVICE).float()
    expected = budget.run_with_gradients(_op(), "reference", inputs, [dy])
    for op in ("add_branch_fwd", "add_branch_bwd"):
        for config in tuning.candidates(op):
            with tuning.overriding(op, config):
                found = budget.run_with_gradients(_op(), "triton", inputs, [dy])
            for name, value in found.items():
                assert torch.equal(value, expected[name]), name


@budget.rehearsed
@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
def test_same_bits_a_thousand_times(dtype: torch.dtype, full: bool) -> None:
    shape = (1023, 768) if full else (33, 72)
    budget.assert_repeatable(_op(0.3), _inputs(*shape, dtype), times=1000 if full else 2)


def test_opcheck() -> None:
    leaves = [t.requires_grad_() for t in _inputs(5, 24, torch.float32).values()]
    seed = torch.tensor(SEED, device=DEVICE)
    torch.library.opcheck(_add_branch_fwd, (*leaves, seed, 0.2))
    torch.library.opcheck(_add_branch_fwd, (*leaves[:2], None, None, 0.0))
    dy = torch.randn(5, 24, device=DEVICE)
    torch.library.opcheck(_add_branch_bwd, (dy, leaves[2].detach(), seed, 0.2, torch.float16))
    torch.library.opcheck(_add_branch_bwd, (dy, None, None, 0.0, torch.float32))


def test_compiles_whole_at_two_lengths() -> None:
    def step(x: Tensor, branch: Tensor, branch_bias: Tensor) -> Tensor:
        return _op(0.2)("triton", x, branch, branch_bias)

    assert_compiles_whole(step, [_inputs(N, 24, torch.float32) for N in (4, 9)])


@budget.rehearsed
def test_captured_in_a_cuda_graph(full: bool) -> None:
    shape = (257, 768) if full else (9, 72)
    leaves = [t.requires_grad_() for t in _inputs(*shape, torch.bfloat16).values()]

    def step() -> list[Tensor]:
        y = _op(0.2)("triton", *leaves)
        return [y, *torch.autograd.grad(y, leaves, y)]

    assert_graph_replays(step, leaves)


@budget.rehearsed
def test_more_elements_than_int32_counts(full: bool) -> None:
    shape = (2**21 + 1, 1024) if full else (33, 80)
    x = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    y = add_branch(x, x, impl="triton")
    assert torch.equal(y[-5:], x[-5:] + x[-5:])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"branch": torch.ones(2, 7)}, ValueError, r"branch must have shape \(2, 8\) to match x"),
        ({"branch_bias": torch.ones(7)}, ValueError, r"branch_bias must have shape \(8,\)"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(2, 8), "branch": torch.ones(2, 8)}
    with pytest.raises(error, match=f"add_branch: {message}"):
        add_branch(**(arguments | change))
