"""What FP8 asks of a GPU's library, which takes far less than the CPU's that stands in for it."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels.linear_fp8 import _fp8_matmul, _scaled_product
from fastgpt2.kernels.quantize_fp8 import E4M3, E5M2, quantize
from tests.kernels import budget
from tests.kernels.budget import DEVICE
from tests.kernels.fp8 import (
    FORMATS,
    SUMS,
    head_gradients,
    head_inputs,
    layer_gradients,
    layer_inputs,
)

# the package exports functions under their modules' names
op_module = importlib.import_module("fastgpt2.kernels.linear_fp8")
head_module = importlib.import_module("fastgpt2.kernels.linear_cross_entropy")


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_the_tensor_cores_call(out_dtype: torch.dtype, with_bias: bool) -> None:
    a = quantize(torch.randn(32, 48, device=DEVICE), E5M2)
    b = quantize(torch.randn(64, 48, device=DEVICE), E4M3)
    bias = torch.randn(64, device=DEVICE).to(out_dtype) if with_bias else None
    arguments = (a.values, b.values, a.inverse, b.inverse, bias, out_dtype, False)
    got = _scaled_product(*arguments)
    expected = (a.values.double() * a.inverse) @ (b.values.double() * b.inverse).T
    if bias is not None:
        expected += bias.double()
    assert got.dtype == out_dtype
    limit = torch.finfo(out_dtype).eps * expected.abs() + 1e-5 * expected.abs().max()
    assert ((got.double() - expected).abs() <= limit).all()


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every product takes the way of a GPU, to a library as strict as a GPU's; what it was asked.

    A CPU's ``torch._scaled_mm`` takes any layout, any width and any two formats.
    """
    calls: list[tuple[Any, ...]] = []

    def strict(
        a: Tensor,
        b: Tensor,
        scale_a: Tensor,
        scale_b: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        use_fast_accum: bool,
    ) -> Tensor:
        (M, K), N = a.shape, b.shape[1]
        assert b.shape == (K, N) and K % 16 == 0 == N % 16
        assert a.stride() == (K, 1), "a is not row-major"
        assert b.stride() == (1, K), "b is not column-major"
        assert b.dtype == E4M3 and a.dtype in FORMATS, "no two of e5m2"
        for scale in (scale_a, scale_b):
            assert scale.dtype == torch.float32 and scale.shape == () and scale.device == a.device
        assert bias is None or (bias.dtype == out_dtype != torch.float32 and bias.shape == (N,))
        calls.append((M, K, N, a.dtype, out_dtype, use_fast_accum))
        sums = (a.double() * scale_a) @ (b.double() * scale_b)
        return (sums if bias is None else sums + bias).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", strict)
    monkeypatch.setattr(op_module, "_fp8_matmul", _scaled_product)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_s_calls(
    dtype: torch.dtype, tensor_cores: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = layer_inputs(37, 48, 80, dtype)
    # a gradient whose rows are one and the same memory, and weights stored the other way round
    dy = torch.randn(80, device=DEVICE).to(dtype).expand(37, 80)
    inputs["weight"] = inputs["weight"].t().contiguous().t()
    found = layer_gradients(inputs, dy)
    # the sum of the weight's gradient is over 37 rows and 11 of zeros; only forward is fast
    assert tensor_cores == [
        (37, 48, 80, E4M3, dtype, True),
        (37, 80, 48, E5M2, dtype, False),
        (80, 48, 48, E5M2, torch.float32, False),
    ]
    monkeypatch.setattr(op_module, "_fp8_matmul", _fp8_matmul)
    _assert_one_rounding_apart(found, layer_gradients(inputs, dy))


def test_the_head_s_calls(
    tensor_cores: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bf16, inputs = torch.bfloat16, head_inputs(torch.bfloat16)
    monkeypatch.setattr(head_module, "_chunk_rows", lambda *args: 32)
    found = head_gradients(inputs, fp8=True)
    # two chunks, of 32 and of 5 rows; 50 columns are 64
    assert tensor_cores == [
        (32, 32, 64, E4M3, bf16, True),
        (32, 64, 32, E5M2, bf16, False),
        (64, 32, 32, E5M2, torch.float32, False),
        (5, 32, 64, E4M3, bf16, True),
        (5, 64, 32, E5M2, bf16, False),
        (64, 16, 32, E5M2, torch.float32, False),
    ]
    monkeypatch.setattr(op_module, "_fp8_matmul", _fp8_matmul)
    names = ("loss", "dx", "dweight")
    expected = dict(zip(names, head_gradients(inputs, fp8=True), strict=True))
    _assert_one_rounding_apart(dict(zip(names, found, strict=True)), expected)


def _assert_one_rounding_apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        step = torch.finfo(value.dtype).eps * value.abs() + SUMS * value.abs().max()
        assert ((found[name] - value).abs() <= step).all(), name


@budget.rehearsed
def test_a_gpu_and_a_cpu_give_the_same_numbers(full: bool) -> None:
    N, C, F = (1023, 768, 3072) if full else (37, 48, 80)
    inputs = layer_inputs(N, C, F, torch.bfloat16)
    dy = torch.randn(N, F, device=DEVICE).bfloat16()
    found = layer_gradients(inputs, dy)
    expected = layer_gradients({n: t.cpu() for n, t in inputs.items()}, dy.cpu())
    for name, value in expected.items():
        error = float((found[name].cpu().double() - value.double()).norm() / value.double().norm())
        # the forward product may keep 14 bits of its sums
        assert error < 4e-3, f"{name}: {error}"
