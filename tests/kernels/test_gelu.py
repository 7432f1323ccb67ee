"""GELU, alone and with a bias: every implementation against fp64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels import tuning
from fastgpt2.kernels.gelu import bias_gelu, gelu, gelu_fwd
from tests.kernels import budget
from tests.kernels.budget import DEVICE
from tests.kernels.graphs import assert_compiles_whole, assert_graph_replays
from tests.kernels.layouts import LAYOUTS, lay_out

SHAPES = budget.grid(
    [(1, 63), (3, 768), (129, 1), (37, 80)],
    [(N, C) for N in budget.ROWS for C in (*budget.WIDTHS, 3072, 6400)],
)


def _inputs(N: int, F: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values on both of GELU's sides, into its tails."""
    return {
        "x": (2 * torch.randn(N, F, device=DEVICE)).to(dtype),
        "bias": torch.randn(F, device=DEVICE).to(dtype),
    }


def _gelu(impl: str, x: Tensor) -> Tensor:
    return gelu(x, impl=impl)


def _bias_gelu(impl: str, x: Tensor, bias: Tensor) -> Tensor:
    return bias_gelu(x, bias, impl=impl)


@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_budget(shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = _inputs(*shape, dtype)
    budget.check_op(_bias_gelu, inputs)
    budget.check_op(_gelu, {"x": inputs["x"]})


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_other_implementations_are_within_budget(impl: str) -> None:
    # each is the other's measure
    eager = "reference" if impl == "torch" else "torch"
    inputs = _inputs(37, 80, torch.float32)
    budget.check_op(_bias_gelu, inputs, impl=impl, eager=eager)
    budget.check_op(_gelu, {"x": inputs["x"]}, impl=impl, eager=eager)


def test_reference_is_openai_s_formula() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    expected = [
        0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x
    ]
    torch.testing.assert_close(gelu(x, impl="reference"), torch.stack(expected))


def _gold(x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and slope in fp64, from sigmoids: tanh loses the tails even there."""
    z = x.double()
    scale = 2 * math.sqrt(2 / math.pi)
    v = scale * (z + 0.044715 * z**3)
    s, t = torch.sigmoid(v), torch.sigmoid(-v)
    return z * s, s + z * s * t * scale * (1 + 3 * 0.044715 * z**2)


def test_tails_keep_their_relative_precision() -> None:
    x = torch.linspace(-7.5, -0.9, 997, device=DEVICE, requires_grad=True)
    y = gelu(x, impl="triton")
    (dx,) = torch.autograd.grad(y.sum(), x)
    value, slope = _gold(x.detach())
    # 1 - sigmoid(v), or 1 + tanh(u), would be zero from -5.6 on
    torch.testing.assert_close(y.detach().double(), value, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(dx.double(), slope, rtol=2e-5, atol=0.0)


def test_every_finite_input_has_a_finite_slope() -> None:
    edges = [0.0, -0.0, 1e-30, 12.0, 1e4, 1e13, 1e20, 3.4e38]
    x = torch.tensor([s * e for e in edges for s in (1, -1)], device=DEVICE, requires_grad=True)
    y = gelu(x, impl="triton")
    (dx,) = torch.autograd.grad(y.sum(), x)
    large = x.detach().abs() > 10
    positive = (x.detach() > 0).float()
    assert torch.equal(y.detach()[large], (x.detach() * positive)[large])
    assert torch.equal(dx[large], positive[large])
    torch.testing.assert_close(dx[~large], torch.full_like(dx[~large], 0.5))


def test_parameter_keeps_its_own_dtype() -> None:
    inputs = _inputs(7, 48, torch.float16)
    inputs["bias"] = inputs["bias"].float()
    budget.check_op(_bias_gelu, inputs)


def test_bias_gradient_is_summed_in_fp32() -> None:
    x = torch.full((1024, 3), 3.0, dtype=torch.float16, device=DEVICE)
    bias = torch.zeros(3, dtype=torch.float16, device=DEVICE, requires_grad=True)
    (dbias,) = torch.autograd.grad(bias_gelu(x, bias, impl="triton").sum(), bias)
    expected = 1024 * _gold(x[0])[1]
    torch.testing.assert_close(dbias.double(), expected, rtol=5e-4, atol=0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_and_gradients(layout: str) -> None:
    inputs = _inputs(6, 40, torch.float32)

    x, dy = inputs["x"].view(2, 3, 40), torch.randn(2, 3, 40, device=DEVICE)
    bias = torch.repeat_interleave(inputs["bias"], 2)[::2]
    results = []
    for given, upstream in ((x, dy), (lay_out(x, layout), lay_out(dy, layout))):
        leaves = [given.detach().requires_grad_(), bias.detach().requires_grad_()]
        y = bias_gelu(leaves[0], leaves[1], impl="triton")
        results.append([y, *torch.autograd.grad(y, leaves, upstream)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_any_number_of_dimensions() -> None:
    x = torch.randn(24, device=DEVICE)
    expected = gelu(x, impl="triton")
    for shape in ((24,), (2, 12), (2, 3, 4), (24, 1)):
        assert torch.equal(gelu(x.view(shape), impl="triton").flatten(), expected)
    scalar = x[0].clone().requires_grad_()
    y = gelu(scalar, impl="triton")
    assert y.shape == () and torch.equal(y, expected[0])
    assert torch.autograd.grad(y, scalar)[0].shape == ()


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0,)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    bias = torch.ones(shape[-1:], device=DEVICE, requires_grad=True)
    y = bias_gelu(x, bias, impl="triton")
    dx, dbias = torch.autograd.grad(y, (x, bias), torch.empty_like(y))
    assert y.shape == dx.shape == shape
    assert dbias.shape == shape[-1:] and not dbias.any()


def test_every_config_sums_alike() -> None:
    inputs = _inputs(37, 80, torch.float32)
    # slopes of exactly 0 and 1, and whole upstream gradients: the sums are exact in any order
    inputs["x"] = 32.0 * torch.randint(-1, 2, (37, 80), device=DEVICE).float()
    inputs["bias"] = torch.full((80,), 64.0, device=DEVICE)
    dy = torch.randint(-8, 9, (37, 80), device=DEVICE).float()
    leaves = [t.requires_grad_() for t in inputs.values()]
    launches: dict[str, dict[str, int]] = {"gelu_fwd": {}, "gelu_bwd": {"erf": 0}, "column_sum": {}}
    for op, shape in launches.items():
        for config in tuning.candidates(op, **shape):
            with tuning.overriding(op, config):
                y = _bias_gelu("triton", *leaves)
                dx, dbias = torch.autograd.grad(y, leaves, dy)
            assert torch.equal(y, inputs["x"] + 64.0)
            assert torch.equal(dx, dy) and torch.equal(dbias, dy.sum(0))


@budget.rehearsed
@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
def test_same_bits_a_thousand_times(dtype: torch.dtype, full: bool) -> None:
    shape = (1023, 3072) if full else (33, 72)
    budget.assert_repeatable(_bias_gelu, _inputs(*shape, dtype), times=1000 if full else 2)


@budget.rehearsed
def test_more_elements_than_int32_counts(full: bool) -> None:
    shape = (2**20 + 1, 3072) if full else (33, 80)
    x = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    y = gelu(x, impl="triton")
    assert torch.equal(y[-5:], gelu(x[-5:].clone(), impl="triton"))


def test_opcheck() -> None:
    leaves = [t.requires_grad_() for t in _inputs(5, 24, torch.float32).values()]
    torch.library.opcheck(gelu_fwd, (*leaves, "tanh"))
    torch.library.opcheck(gelu_fwd, (leaves[0], None, "erf"))


def test_compiles_whole_at_two_lengths() -> None:
    def step(x: Tensor, bias: Tensor) -> Tensor:
        return gelu(bias_gelu(x, bias, impl="triton"), impl="triton")

    assert_compiles_whole(step, [_inputs(N, 24, torch.float32) for N in (4, 9)])


@budget.rehearsed
def test_captured_in_a_cuda_graph(full: bool) -> None:
    shape = (257, 3072) if full else (9, 72)
    leaves = [t.requires_grad_() for t in _inputs(*shape, torch.bfloat16).values()]

    def step() -> list[Tensor]:
        y = _bias_gelu("triton", *leaves)
        return [y, *torch.autograd.grad(y, leaves, y)]

    assert_graph_replays(step, leaves)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 8).long()}, TypeError, "x must be floating point, got torch.int64"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"bias": torch.ones(8).long()}, TypeError, "bias must be floating point"),
        ({"bias": torch.ones(7)}, ValueError, r"bias must have shape \(8,\) to match x \(2, 8\)"),
        ({"bias": torch.ones(8, device="meta")}, ValueError, "bias must be on cpu, got meta"),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, triton, torch, reference"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(2, 8), "bias": torch.ones(8)}
    with pytest.raises(error, match=message):
        bias_gelu(**(arguments | change))
    if "bias" not in change:
        with pytest.raises(error, match=message):
            gelu(**({"x": arguments["x"]} | change))
