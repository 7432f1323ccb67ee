"""FP8: the rounding against its definition, the products against fp64, and who may run it."""

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels import linear_cross_entropy, linear_fp8
from fastgpt2.kernels.linear_fp8 import (
    _fp8_matmul,
    fp8_matmul,
    fp8_obstacle,
)
from fastgpt2.kernels.quantize_fp8 import E4M3, E5M2, quantize
from tests.kernels.budget import DEVICE
from tests.kernels.fp8 import (
    FORMATS,
    SUMS,
    head_gradients,
    head_inputs,
    layer_gradients,
    layer_inputs,
)
from tests.kernels.graphs import assert_compiles_whole

# the package exports functions under their modules' names
op_module = importlib.import_module("fastgpt2.kernels.linear_fp8")
head_module = importlib.import_module("fastgpt2.kernels.linear_cross_entropy")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``quantize`` keeps of x, by the definition of the format, in fp64."""
    largest, bits, smallest = FORMATS[dtype]
    scale = largest / x.double().abs().max()
    scaled = x.double() * scale
    exponent = scaled.abs().clamp(min=smallest).log2().floor()
    step = torch.exp2(exponent - bits)
    # round: half to even, as the format's own
    return (scaled / step).round() * step / scale


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e6])
def test_rounding_is_the_format_s(dtype: torch.dtype, spread: float) -> None:
    # over so many magnitudes that some are below the smallest normal number
    x = torch.randn(64, 48, device=DEVICE) * torch.logspace(-6, 0, 48, device=DEVICE) * spread
    values, inverse = quantize(x, dtype)
    assert values.dtype == dtype and values.shape == x.shape
    assert float(values.float().abs().max()) == FORMATS[dtype][0]
    kept = values.double() * inverse.double()
    expected = _rounded(x, dtype)
    # the scale is rounded to fp32, so a number just between two may fall to the other side
    close = (kept - expected).abs() <= 1e-6 * expected.abs()
    assert float(close.double().mean()) > 0.999
    torch.testing.assert_close(kept[close], expected[close], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_bf16_is_scaled_in_fp32(dtype: torch.dtype) -> None:
    x = torch.randn(64, 48, device=DEVICE).bfloat16()
    short, wide = quantize(x, dtype), quantize(x.float(), dtype)
    assert torch.equal(short.values.float(), wide.values.float())
    assert torch.equal(short.inverse, wide.inverse)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_special_values(dtype: torch.dtype) -> None:
    zeros = quantize(torch.zeros(16, 16, device=DEVICE), dtype)
    assert not zeros.values.float().any() and zeros.inverse.isfinite()
    tiny = torch.full((16, 16), 1e-42, device=DEVICE)
    assert quantize(tiny, dtype).values.float().isfinite().all()
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.ones(16, 16, device=DEVICE)
        x[3, 5] = bad
        a = quantize(x, dtype)
        weight = quantize(torch.ones(16, 16, device=DEVICE), E4M3)
        # no number of this row is one to train on
        assert fp8_matmul(a, weight, torch.float32)[3].isnan().all()
    one = torch.ones((), device=DEVICE)
    bounded = quantize(torch.full((16, 16), 0.5, device=DEVICE), dtype, amax=one)
    assert float(bounded.values.float()[0, 0]) == FORMATS[dtype][0] / 2
    assert quantize(torch.empty(0, 16, device=DEVICE), dtype).values.shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 16), (37, 48, 80), (50, 160, 32)], ids=str)
def test_products_of_the_rounded_operands(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = layer_inputs(*shape, dtype)
    dy = torch.randn(shape[0], shape[2], device=DEVICE).to(dtype)
    found = layer_gradients(inputs, dy)
    x, weight = (
        quantized.values.double() * quantized.inverse.double()
        for quantized in (quantize(inputs["x"], E4M3), quantize(inputs["weight"], E4M3))
    )
    d8 = quantize(dy, E5M2)
    d = d8.values.double() * d8.inverse.double()
    bias = inputs["bias"].to(dtype).double()
    expected = {
        "y": x @ weight.T + bias,
        "dx": d @ weight,
        "dweight": d.T @ x,
        # of the gradient as it came
        "dbias": dy.double().sum(0),
    }
    for name, value in expected.items():
        kind = dtype if name in ("y", "dx") else torch.float32
        assert found[name].dtype == kind
        # fp32 sums, one rounding
        rounding = torch.finfo(kind).eps / 2 * value.abs() + SUMS * value.abs().max()
        assert ((found[name].double() - value).abs() <= rounding).all(), name


def test_close_to_the_true_products() -> None:
    inputs = layer_inputs(64, 128, 96)
    dy = torch.randn(64, 96, device=DEVICE)
    found = layer_gradients(inputs, dy)
    x, weight, bias = (t.double() for t in inputs.values())
    expected = {"y": x @ weight.T + bias, "dx": dy.double() @ weight, "dweight": dy.double().T @ x}
    for name, value in expected.items():
        error = float((found[name].double() - value).norm() / value.norm())
        # two significands of 4 bits, or one of 4 and one of 3, rounded to half a unit
        assert 0.005 < error < (0.05 if name == "y" else 0.1), f"{name}: {error}"


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_only_wanted_gradients_are_computed(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[int] = []
    product = op_module._fp8_matmul

    def counted(*args: Any) -> Tensor:
        products.append(1)
        out: Tensor = product(*args)
        return out

    monkeypatch.setattr(op_module, "_fp8_matmul", counted)
    leaves = {n: t.requires_grad_(n != frozen) for n, t in layer_inputs(5, 16, 32).items()}
    torch.autograd.backward(linear_fp8(**leaves).sum())
    found = {n for n, t in leaves.items() if t.grad is not None}
    assert found == leaves.keys() - {frozen}
    assert len(products) == (3 if frozen == "bias" else 2)


@pytest.mark.parametrize("rows", [16, 37, 0])
def test_transposes_are_padded_with_zeros(rows: int) -> None:
    a = quantize(torch.randn(rows, 32, device=DEVICE), E4M3)
    turned = a.t()
    padded = -(-rows // 16) * 16
    assert turned.values.shape == (32, padded) and turned.values.is_contiguous()
    assert torch.equal(turned.values.float()[:, :rows], a.values.float().t())
    assert not turned.values.float()[:, rows:].any()


def test_any_number_of_dimensions() -> None:
    inputs = layer_inputs(6, 16, 32)
    flat = linear_fp8(**inputs)
    for shape in ((2, 3, 16), (1, 6, 1, 16)):
        y = linear_fp8(**inputs | {"x": inputs["x"].view(shape)})
        assert torch.equal(y, flat.view(*shape[:-1], 32))
    leaves = {n: t.requires_grad_() for n, t in layer_inputs(0, 16, 32).items()}
    y = linear_fp8(**leaves)
    assert y.shape == (0, 32)
    for gradient in torch.autograd.grad(y, list(leaves.values()), y):
        assert not gradient.any()


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_head_and_loss(impl: str, z_loss: float) -> None:
    inputs = head_inputs()
    loss, dx, dweight = head_gradients(inputs, fp8=True, impl=impl, z_loss=z_loss)
    plain_loss, plain_dx, plain_dweight = head_gradients(inputs, impl=impl, z_loss=z_loss)
    assert abs(float(loss - plain_loss)) < 0.02 and not torch.equal(loss, plain_loss)
    for got, plain in ((dx, plain_dx), (dweight, plain_dweight)):
        assert got.shape == plain.shape and got.dtype == plain.dtype
        error = float((got - plain).norm() / plain.norm())
        assert 0.005 < error < 0.1
    assert not dx[inputs["targets"] == -100].any()
    assert not dweight[45:].any()


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_head_in_many_tiles(z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = head_inputs(torch.bfloat16)
    whole = head_gradients(inputs, fp8=True, z_loss=z_loss)
    # seven rows of 64 columns: the last tile is short
    monkeypatch.setattr(op_module, "_TILE_ELEMENTS", 7 * 64)
    for got, expected in zip(head_gradients(inputs, fp8=True, z_loss=z_loss), whole, strict=True):
        assert torch.equal(got, expected)


def test_head_in_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = head_inputs(torch.bfloat16)
    whole = head_gradients(inputs, fp8=True)
    monkeypatch.setattr(head_module, "_chunk_rows", lambda *args: 5)
    loss, dx, dweight = head_gradients(inputs, fp8=True)
    torch.testing.assert_close(loss, whole[0])
    # the gradient's bound is known, so a chunk is rounded as the whole is
    torch.testing.assert_close(dx, whole[1])
    torch.testing.assert_close(dweight, whole[2], rtol=1e-2, atol=1e-4)


def test_contract_and_compile() -> None:
    a, b = (quantize(torch.randn(32, 48, device=DEVICE), E4M3) for _ in range(2))
    bias = torch.randn(32, device=DEVICE)
    for given in (None, bias):
        arguments = (a.values, b.values, a.inverse, b.inverse, given, torch.float32, False)
        # to see whether an input was written to, the schema's check would have to add FP8 numbers
        checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(_fp8_matmul, arguments, test_utils=checks)
    assert_compiles_whole(linear_fp8, [layer_inputs(N, 16, 32) for N in (5, 9)])
    targets = torch.randint(45, (9,), device=DEVICE)

    def head(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, vocab_size=45, fp8=True)

    x = torch.randn(9, 32, device=DEVICE)
    assert_compiles_whole(head, [{"x": x, "weight": torch.randn(48, 32, device=DEVICE)}])


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"x": torch.ones(2, 16).half()}, ValueError, "activations must be in bf16 or fp32"),
        ({"x": torch.ones(2, 16).double()}, ValueError, "not float64"),
        ({"x": torch.ones(2, 16).long()}, TypeError, "x must be floating point"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have a last dimension"),
        (
            {"weight": torch.ones(33, 16), "bias": torch.ones(33)},
            ValueError,
            "multiples of 16, got 33",
        ),
        ({"weight": torch.ones(32, 15)}, ValueError, "weight must have shape (32, 16)"),
        ({"bias": torch.ones(31)}, ValueError, "bias must have shape (32,)"),
        ({"bias": torch.ones(32).long()}, TypeError, "bias must be floating point"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments(change: dict[str, Tensor], error: type[Exception], said: str) -> None:
    inputs: dict[str, Any] = {"x": torch.ones(2, 16), "weight": torch.ones(32, 16)}
    inputs["bias"] = torch.ones(32)
    with pytest.raises(error) as raised:
        linear_fp8(**(inputs | change))
    assert said in str(raised.value)


def test_the_head_says_what_fp8_cannot() -> None:
    inputs = head_inputs()
    with pytest.raises(ValueError, match="fp8 has no reference implementation"):
        head_gradients(inputs, fp8=True, impl="reference")
    with pytest.raises(ValueError, match="linear_cross_entropy: FP8 cannot run: activations must"):
        head_gradients(
            {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}, fp8=True
        )
    with pytest.raises(ValueError, match="multiples of 16, got 31"):
        head_gradients(
            inputs | {"x": inputs["x"][:, :31], "weight": inputs["weight"][:, :31]}, fp8=True
        )


def test_who_has_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, obstacle in (
        ((8, 0), "the GPU has compute capability 8.0, FP8 needs 8.9"),
        ((8, 9), None),
        ((9, 0), None),
        ((10, 0), None),
    ):
        monkeypatch.setattr(op_module, "capability", lambda index, found=capability: found)
        assert fp8_obstacle(CUDA, torch.bfloat16, 768) == obstacle
    assert fp8_obstacle(CPU, torch.bfloat16, 768, 3072) is None
    assert "on mps" in str(fp8_obstacle(torch.device("mps"), torch.bfloat16))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "AMD" in str(fp8_obstacle(CUDA, torch.bfloat16))
