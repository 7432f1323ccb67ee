"""The rounding to FP8 in both layouts: the kernels give the very bits of the definition.

Without a GPU the kernels are interpreted. The last step, from fp32 to FP8, is then PyTorch's, since
Triton's interpreter does it wrongly. All else is the kernels' own: magnitudes, scale and layouts.
"""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgpt2.kernels import linear_cross_entropy, linear_fp8, tuning
from fastgpt2.kernels.gpus import ARCHITECTURES, has_fp8
from fastgpt2.kernels.jit.launch import Launch, noting
from fastgpt2.kernels.jit.quantize_fp8 import compile_cases
from fastgpt2.kernels.linear_fp8 import HeadFP8
from fastgpt2.kernels.quantize_fp8 import (
    E4M3,
    E5M2,
    Quantized,
    _quantize_fp8,
    largest_of,
    quantize,
    quantize_fp8,
)
from tests.kernels import budget
from tests.kernels.budget import DEVICE
from tests.kernels.fp8 import FORMATS, layer_inputs
from tests.kernels.graphs import assert_compiles_whole
from tests.played_gpus import play_architecture

FORMAT = pytest.mark.parametrize("format", FORMATS, ids=str)
NAN = 0x7F


def _bits(quantized: Quantized) -> Tensor:
    """The bytes; every NaN is the same."""
    nan = quantized.values.float().isnan()
    return quantized.values.view(torch.uint8).masked_fill(nan, NAN)


def _draw(N: int, C: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of many magnitudes, the smallest of them below FP8's normal ones."""
    return (torch.randn(N, C) * torch.logspace(-7, 0, C)).to(DEVICE, dtype)


def _assert_defined(x: Tensor, format: torch.dtype, amax: Tensor | None = None) -> None:
    straight, turned = quantize_fp8(x, format, amax=amax, impl="triton")
    # a GPU divides by a constant as by its reciprocal: the definition is on a CPU
    expected = quantize(x.cpu(), format, None if amax is None else amax.cpu())
    assert straight.values.dtype == turned.values.dtype == format
    assert straight.values.is_contiguous() and turned.values.is_contiguous()
    assert torch.equal(_bits(straight).cpu(), _bits(expected))
    assert torch.equal(_bits(turned).cpu(), _bits(expected.t()))
    for found in (straight.inverse, turned.inverse):
        torch.testing.assert_close(
            found.cpu(), expected.inverse, rtol=0.0, atol=0.0, equal_nan=True
        )


@FORMAT
@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", budget.grid([(1, 16), (37, 48), (80, 160)], [(1023, 768), (4096, 3072)]), ids=str
)
def test_the_bits_are_those_of_the_definition(
    shape: tuple[int, int], dtype: torch.dtype, format: torch.dtype
) -> None:
    x = _draw(*shape, dtype)
    before = x.clone()
    _assert_defined(x, format)
    assert torch.equal(x, before)


@pytest.mark.parametrize("op", ["fp8_amax", "quantize_fp8"])
def test_every_config_gives_the_bits(op: str) -> None:
    x = _draw(37, 160)
    for config in tuning.candidates(op):
        with tuning.overriding(op, config):
            _assert_defined(x, E4M3)


def test_any_strides() -> None:
    wide = _draw(40, 96)
    for x in (wide[3:, 16:64], wide.t(), wide[:1].expand(21, 96), wide[::2]):
        _assert_defined(x, E5M2)


@FORMAT
def test_a_bound_that_is_given_is_the_scale(format: torch.dtype) -> None:
    for bound in (8.0, 1e-30):
        x = _draw(20, 32).clamp(-bound, bound)
        _assert_defined(x, format, torch.tensor(bound, device=DEVICE))


def test_the_scale_has_the_definitions_last_bit() -> None:
    """Numbers that (1 / a) m and m / a scale to different sides of a tie."""
    largest, found = torch.finfo(E4M3).max, 0
    for bound in torch.rand(20, generator=torch.Generator().manual_seed(0)) * 4 + 1:
        scale, other = 1 / bound * largest, torch.tensor(largest) / bound
        # between 1 and 1.125, the next number of the format; a tie goes to 1
        x = (1.0625 / scale * (1 + torch.arange(-4, 5) * 2.0**-23))[None]
        found += int(((x * scale).to(E4M3).float() != (x * other).to(E4M3).float()).sum())
        _assert_defined(x.to(DEVICE), E4M3, bound.to(DEVICE))
    assert found


@FORMAT
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_hidden(bad: float, format: torch.dtype) -> None:
    # of several programs, the last one sees it, and the first one
    for row, column in ((36, 47), (0, 0)):
        x = _draw(37, 48)
        x[row, column] = bad
        straight, turned = quantize_fp8(x, format, impl="triton")
        expected = quantize(x.cpu(), format)
        assert torch.equal(_bits(straight).cpu(), _bits(expected))
        assert torch.equal(_bits(turned)[:, :37].cpu(), _bits(expected).t())
        assert straight.values.float()[row, column].isnan()
        assert not straight.inverse.isfinite()


@FORMAT
@pytest.mark.parametrize("value", [0.0, 1e-42, 2.0**-61, 3e38])
def test_the_smallest_and_the_largest_numbers(value: float, format: torch.dtype) -> None:
    x = torch.full((17, 16), value, device=DEVICE)
    _assert_defined(x, format)
    assert quantize_fp8(x, format, impl="triton")[0].values.float().isfinite().all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_only_the_layouts_that_are_wanted(impl: str) -> None:
    x = _draw(21, 32)
    both = quantize_fp8(x, E4M3, impl=impl)
    for wanted in (0, 1):
        one = quantize_fp8(x, E4M3, straight=wanted == 0, turned=wanted == 1, impl=impl)
        assert torch.equal(_bits(one[wanted]), _bits(both[wanted]))
        assert one[1 - wanted].values.numel() == 0
        assert torch.equal(one[0].inverse, both[0].inverse)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("shape", [(0, 16), (16, 0)], ids=str)
def test_nothing_is_rounded_to_nothing(shape: tuple[int, int], impl: str) -> None:
    straight, turned = quantize_fp8(torch.empty(shape, device=DEVICE), E4M3, impl=impl)
    assert straight.values.shape == shape and turned.values.shape == shape[::-1]
    assert straight.inverse.isfinite()


def _layer(inputs: dict[str, Tensor], impl: str) -> list[Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    y = linear_fp8(**leaves, impl=impl)
    dy = torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_has_the_same_bits_on_the_kernels(dtype: torch.dtype) -> None:
    inputs = layer_inputs(37, 48, 80, dtype)
    for got, expected in zip(_layer(inputs, "triton"), _layer(inputs, "torch"), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("amax", [1.0, None])
def test_a_head_has_the_same_bits_on_the_kernels(amax: float | None) -> None:
    x, weight = torch.randn(37, 32, device=DEVICE), torch.randn(50, 32, device=DEVICE)
    dlogits = torch.rand(37, 64, device=DEVICE) - 0.5
    results = []
    for triton in (True, False):
        head = HeadFP8(x, weight, amax, turned=True, triton=triton)
        rows, gradient = slice(0, 37), head.gradient(dlogits)
        products = head.logits(rows), head.dx(gradient)
        results.append([*products, head.dweight(gradient, rows, torch.float32)])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_the_head_s_kernels_are_launched() -> None:
    launches: list[Launch] = []
    x, weight = (torch.randn(rows, 32, device=DEVICE, requires_grad=True) for rows in (37, 50))
    targets = torch.zeros(37, dtype=torch.int64, device=DEVICE)
    with noting(launches):
        linear_cross_entropy(x, weight, targets, fp8=True, impl="triton")
    names = Counter(launch.kernel.fn.__name__ for launch in launches)
    # x, the weight, and the gradient of the logits, whose largest magnitude is known
    assert (names["_quantize_fp8_kernel"], names["_fp8_amax_kernel"]) == (3, 2)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_layer_saves_one_layout_of_each_operand(impl: str) -> None:
    N, C, F = 37, 48, 80
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel() * x.itemsize)
        return x

    for frozen, expected in (("", 48 * C + F * C), ("weight", F * C), ("x", 48 * C)):
        sizes.clear()
        leaves = {n: t.requires_grad_(n != frozen) for n, t in layer_inputs(N, C, F).items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            linear_fp8(**leaves, impl=impl)
        # and two scales
        assert sum(sizes) == expected + 2 * 4


@pytest.mark.parametrize("gpu", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), "gfx942"])
def test_auto_takes_the_kernels_where_there_is_fp8(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    able = gpu in ((8, 9), (9, 0), (10, 0), (12, 0))
    play_architecture(monkeypatch, gpu)
    seen: list[Any] = []

    def spy(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(arguments)
        return x, x, x

    def definition(x: Tensor, *arguments: Any) -> Quantized:
        return Quantized(x, x)

    monkeypatch.setitem(quantize_fp8.__globals__, "_quantize_fp8", spy)
    monkeypatch.setitem(quantize_fp8.__globals__, "quantize", definition)
    with FakeTensorMode():
        x = torch.empty(32, 16, device="cuda")
        quantize_fp8(x, E4M3, turned=False)
        assert len(seen) == able
        if not able:
            with pytest.raises(RuntimeError, match=r"compute capability 8\.9, not on"):
                quantize_fp8(x, E4M3, impl="triton")
    tuning._architecture.cache_clear()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_is_compiled_where_there_is_fp8(arch: str) -> None:
    assert has_fp8(arch) == (arch in ("sm_89", "sm_90", "sm_100", "sm_120"))
    assert bool(compile_cases(arch)) == has_fp8(arch)


def test_contract_and_compile() -> None:
    x, bound = _draw(21, 32), torch.ones((), device=DEVICE)
    # to see whether an input was written to, the schema's check would have to add FP8 numbers
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(_quantize_fp8, (x, None, E4M3, True, True), test_utils=checks)
    for layouts in ((True, False), (False, True)):
        torch.library.opcheck(
            _quantize_fp8, (x, bound, E5M2, *layouts), test_utils="test_faketensor"
        )

    def layer(**inputs: Tensor) -> Tensor:
        return linear_fp8(**inputs, impl="triton")

    assert_compiles_whole(layer, [layer_inputs(N, 16, 32) for N in (5, 9)])


@budget.rehearsed
def test_more_elements_than_int32_counts(full: bool) -> None:
    N, C = (700_000, 3072) if full else (70, 48)
    x = torch.ones(N, C, device=DEVICE, dtype=budget.HALF)
    x[-1, -1] = -2.0
    straight, turned = quantize_fp8(x, E4M3, impl="triton")
    for values in (straight.values, turned.values[:, :N]):
        assert float(values[-1, -1].float()) == -FORMATS[E4M3][0]
        assert float(values[0, 0].float()) == float(values[-2, -2].float()) == FORMATS[E4M3][0] / 2
    assert float(straight.inverse) == pytest.approx(2.0 / FORMATS[E4M3][0])


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"x": torch.ones(2, 16).long()}, TypeError, "x must be floating point"),
        ({"x": torch.ones(16)}, ValueError, "x must be (N, C), got shape (16,)"),
        ({"dtype": torch.float16}, ValueError, "dtype must be float8_e4m3fn or float8_e5m2"),
        ({"amax": torch.ones(1)}, ValueError, "amax must have shape ()"),
        ({"amax": torch.ones(()).double()}, ValueError, "amax must be in float32"),
        ({"amax": torch.ones((), device="meta")}, ValueError, "amax must be on cpu, got meta"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], said: str) -> None:
    right: dict[str, Any] = {"x": torch.ones(2, 16), "dtype": E4M3}
    with pytest.raises(error) as raised:
        quantize_fp8(**(right | change))
    assert str(raised.value).startswith("quantize_fp8: ")
    assert said in str(raised.value)


def test_largest_of_nothing_is_zero() -> None:
    assert float(largest_of(torch.empty(0, 16))) == 0.0
