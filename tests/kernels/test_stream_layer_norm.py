"""LayerNorm beside the stream that goes past it: values and gradients of both against fp64."""

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels.layer_norm import stream_layer_norm
from tests.kernels import budget
from tests.kernels.budget import DEVICE


def _inputs(N: int, C: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "x": (torch.randn(N, C, device=DEVICE) + 0.5).to(dtype),
        "weight": torch.randn(C, device=DEVICE).to(dtype),
        "bias": torch.randn(C, device=DEVICE).to(dtype),
    }


def _op(impl: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    stream, norm = stream_layer_norm(x, weight, bias, impl=impl)
    # a result of its own: the stream is x itself
    return stream * 0.75, norm


@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 63), (131, 80), (9, 1600)], ids=str)
def test_within_budget(shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = _inputs(*shape, dtype)
    budget.check_op(_op, inputs)
    budget.check_op(_op, {name: inputs[name] for name in ("x", "weight")})


def test_the_stream_is_x_without_a_copy() -> None:
    inputs = _inputs(3, 16, torch.float32)
    for impl in ("triton", "torch", "reference"):
        stream, _ = stream_layer_norm(*inputs.values(), impl=impl)
        assert stream.data_ptr() == inputs["x"].data_ptr()


@pytest.mark.parametrize("used", [0, 1], ids=["stream", "norm"])
def test_only_one_output_used(used: int) -> None:
    inputs = _inputs(5, 32, torch.float32)
    results = []
    for impl in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        y = stream_layer_norm(*leaves, impl=impl)[used]
        grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
        results.append([x if g is None else g for x, g in zip(leaves, grads, strict=True)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_whole() -> None:
    leaves = [x.requires_grad_() for x in _inputs(5, 32, torch.float32).values()]

    def loss(impl: str) -> Tensor:
        stream, norm = stream_layer_norm(*leaves, impl=impl)
        return (stream * norm.tanh()).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss("reference"), leaves)
    for a, b in zip(torch.autograd.grad(compiled("triton"), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)
