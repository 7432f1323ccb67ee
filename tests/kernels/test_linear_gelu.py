"""Projection, bias and GELU as one op: both Triton routes and the others against fp64."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import linear_gelu, tuning
from fastgpt2.kernels.linear_gelu import _linear_gelu_fwd
from tests.kernels import budget
from tests.kernels.budget import DEVICE
from tests.kernels.graphs import assert_compiles_whole, assert_graph_replays
from tests.kernels.layouts import LAYOUTS, lay_out
from tests.kernels.processors import Processor
from tests.memory import profiled_peak

# the package exports functions under the names of these modules
op_module = importlib.import_module("fastgpt2.kernels.linear_gelu")
linear_module = importlib.import_module("fastgpt2.kernels.linear")

# (rows, width, MLP width)
SHAPES = budget.grid(
    [(1, 33, 20), (37, 48, 80), (70, 16, 17)],
    [(N, C, 4 * C) for N in budget.ROWS for C in budget.WIDTHS if C > 1],
)


def _inputs(N: int, C: int, F: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "x": torch.randn(N, C, device=DEVICE).to(dtype),
        "weight": (torch.randn(F, C, device=DEVICE) / C**0.5).to(dtype),
        "bias": torch.randn(F, device=DEVICE).to(dtype),
    }


Route = Callable[..., Tensor]


@pytest.fixture(params=["fused", "library"])
def op(request: pytest.FixtureRequest) -> Route:
    """The test runs twice: one kernel of ours, and the library's product and then our GELU."""

    def run(impl: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_gelu(x, weight, bias, fused=request.param == "fused", impl=impl)

    return run


@pytest.mark.parametrize("dtype", budget.dtype_grid(), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_budget(op: Route, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    budget.check_op(op, _inputs(*shape, dtype))


def test_bias_is_optional(op: Route) -> None:
    inputs = _inputs(37, 48, 80, torch.float32)
    del inputs["bias"]
    budget.check_op(op, inputs)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_other_implementations_are_within_budget(op: Route, impl: str) -> None:
    # each is the other's measure
    eager = "reference" if impl == "torch" else "torch"
    budget.check_op(op, _inputs(37, 48, 80, torch.float32), impl=impl, eager=eager)


@pytest.mark.parametrize("fused", [True, False])
def test_routes_are_what_they_claim(
    fused: bool, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's route asks ``linear`` once, which asks the processor's library."""
    asked: dict[str, int] = {"linear": 0, "oneDNN": 0}

    def counted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            asked[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(
        op_module, "unchecked_linear", counted("linear", linear_module.unchecked_linear)
    )
    monkeypatch.setattr(linear_module, "_onednn", counted("oneDNN", linear_module._onednn))
    inputs = _inputs(5, 16, 20, torch.float32)
    linear_gelu(inputs["x"], inputs["weight"], inputs["bias"], fused=fused, impl="triton")
    by_library = not fused
    # 5 rows are oneDNN's wherever any are, but on a GPU none is
    built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    onednn = by_library and built and processor.onednn.end > 0 and DEVICE.type == "cpu"
    assert asked == {"linear": int(by_library), "oneDNN": int(onednn)}


def test_parameters_in_fp32_keep_their_gradients_dtype(op: Route) -> None:
    inputs = _inputs(7, 16, 20, torch.float16)
    inputs |= {n: inputs[n].float() for n in ("weight", "bias")}
    budget.check_op(op, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(op: Route, layout: str) -> None:
    inputs = _inputs(6, 16, 20, torch.float32)

    x, dy = inputs["x"].view(2, 3, 16), torch.randn(2, 3, 20, device=DEVICE)
    results = []
    for given, upstream in ((lambda t: t, dy), (lambda t: lay_out(t, layout), lay_out(dy, layout))):
        leaves = [given(t).detach().requires_grad_() for t in (x, inputs["weight"])]
        y = op("triton", *leaves)
        results.append([y, *torch.autograd.grad(y, leaves, upstream)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_no_grad_stores_no_pre_activation(op: Route) -> None:
    inputs = _inputs(7, 16, 20, torch.float32)
    expected = op("triton", **inputs)
    assert not expected.requires_grad
    y, z = _linear_gelu_fwd(*inputs.values(), "tanh", False)
    assert z.numel() == 0
    torch.testing.assert_close(y, expected)
    y, z = _linear_gelu_fwd(*inputs.values(), "tanh", True)
    torch.testing.assert_close(z, inputs["x"] @ inputs["weight"].T)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="of a processor")
@pytest.mark.parametrize("wanted", [False, True])
def test_pytorchs_gelu_takes_memory_of_its_own_only_for_a_gradient(wanted: bool) -> None:
    x, weight, bias = torch.randn(64, 48), torch.randn(192, 48), torch.randn(192)
    expected = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    weight.requires_grad_(wanted)
    before = [t.detach().clone() for t in (x, weight, bias)]
    outputs: list[Tensor] = []

    def call() -> None:
        outputs.append(linear_gelu(x, weight, bias, impl="torch"))

    peak = profiled_peak(call)
    torch.testing.assert_close(outputs[0].detach(), expected)
    assert (peak < 1.5 * expected.nbytes) != wanted
    assert all(map(torch.equal, (x, weight.detach(), bias), before))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_frozen_inputs(op: Route, frozen: str) -> None:
    inputs = _inputs(7, 16, 20, torch.float32)
    gradients = []
    for impl in ("triton", "reference"):
        leaves = {n: t.clone().requires_grad_(n != frozen) for n, t in inputs.items()}
        wanted = [t for t in leaves.values() if t.requires_grad]
        gradients.append(torch.autograd.grad(op(impl, **leaves).sum(), wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_any_number_of_dimensions(op: Route) -> None:
    inputs = _inputs(6, 16, 20, torch.float32)
    weight, bias = inputs["weight"].requires_grad_(), inputs["bias"].requires_grad_()
    for shape in ((16,), (2, 3, 16), (1, 2, 1, 16)):
        x = inputs["x"].flatten()[: torch.Size(shape).numel()].view(shape)
        gradients = []
        for impl in ("triton", "reference"):
            y = op(impl, x, weight, bias)
            assert y.shape == (*shape[:-1], 20)
            gradients.append(torch.autograd.grad(y.square().sum(), (weight, bias)))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def test_empty_batch(op: Route) -> None:
    leaves = {n: t.requires_grad_() for n, t in _inputs(0, 16, 20, torch.float32).items()}
    y = op("triton", **leaves)
    assert y.shape == (0, 20)
    for t, g in zip(leaves.values(), torch.autograd.grad(y, list(leaves.values()), y), strict=True):
        assert g.shape == t.shape and not g.any()


@pytest.mark.parametrize("dtype", budget.dtype_grid(), ids=str)
def test_every_config_is_exact_on_integers(dtype: torch.dtype) -> None:
    N, C, F = 70, 33, 150
    inputs = {n: torch.randint_like(t, -2, 3) for n, t in _inputs(N, C, F, dtype).items()}
    inputs["bias"] += 200
    # products of small integers are exact in any order, and beyond 200 GELU changes nothing
    expected = inputs["x"].double() @ inputs["weight"].double().T
    for config in tuning.candidates("linear_gelu_fwd", bytes=dtype.itemsize):
        with tuning.overriding("linear_gelu_fwd", config):
            y, z = _linear_gelu_fwd(*inputs.values(), "tanh", True)
        assert torch.equal(z.double(), expected)
        assert torch.equal(y, (expected + inputs["bias"].double()).to(dtype))


@budget.rehearsed
@pytest.mark.parametrize("dtype", budget.dtype_grid(), ids=str)
def test_same_bits_a_thousand_times(op: Route, dtype: torch.dtype, full: bool) -> None:
    shape = (1023, 768, 3072) if full else (37, 48, 80)
    budget.assert_repeatable(op, _inputs(*shape, dtype), times=1000 if full else 2)


def test_opcheck() -> None:
    leaves = [t.requires_grad_() for t in _inputs(5, 16, 20, torch.float32).values()]
    torch.library.opcheck(_linear_gelu_fwd, (*leaves, "tanh", True))
    torch.library.opcheck(_linear_gelu_fwd, (leaves[0], leaves[1], None, "erf", True))


def test_compiles_whole_at_two_lengths(op: Route) -> None:
    def step(**inputs: Tensor) -> Tensor:
        return op("triton", **inputs)

    assert_compiles_whole(step, [_inputs(N, 16, 20, torch.float32) for N in (4, 9)])


@budget.rehearsed
def test_captured_in_a_cuda_graph(op: Route, full: bool) -> None:
    shape = (257, 768, 3072) if full else (9, 16, 20)
    leaves = [t.requires_grad_() for t in _inputs(*shape, budget.HALF).values()]

    def step() -> list[Tensor]:
        y = op("triton", *leaves)
        return [y, *torch.autograd.grad(y, leaves, y)]

    assert_graph_replays(step, leaves)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 8).long()}, TypeError, "x must be floating point, got torch.int64"),
        ({"weight": torch.ones(8)}, ValueError, r"weight must be \(F, C\), got shape \(8,\)"),
        ({"weight": torch.ones(9, 7)}, ValueError, r"weight must have shape \(9, 8\) to match x"),
        ({"weight": torch.ones(9, 8, device="meta")}, ValueError, "weight must be on cpu"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have a last dimension of 1 or more"),
        ({"x": torch.ones(2, 0)}, ValueError, "x must have a last dimension of 1 or more"),
        ({"weight": torch.ones(9, 8).long()}, TypeError, "weight must be floating point"),
        ({"bias": torch.ones(7)}, ValueError, r"bias must have shape \(9,\) to match x"),
        ({"bias": torch.ones(9).long()}, TypeError, "bias must be floating point"),
        ({"bias": torch.ones(9, device="meta")}, ValueError, "bias must be on cpu, got meta"),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, triton, torch, reference"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.ones(2, 8),
        "weight": torch.ones(9, 8),
        "bias": torch.ones(9),
    }
    with pytest.raises(error, match=message):
        linear_gelu(**(arguments | change))
