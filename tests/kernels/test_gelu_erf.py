"""The erf form of every op with a GELU: the formula, PyTorch's operator, and Triton's kernels."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt2.kernels import bias_gelu, gelu, linear_gelu, mlp
from tests.kernels import budget
from tests.played_gpus import play_architecture

OPS: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]]]] = {
    "gelu": (gelu, {"x": (37, 48)}),
    "bias_gelu": (bias_gelu, {"x": (37, 48), "bias": (48,)}),
    "linear_gelu": (linear_gelu, {"x": (37, 48), "weight": (80, 48), "bias": (80,)}),
    "mlp": (
        mlp,
        {"x": (37, 48), "fc_weight": (80, 48), "fc_bias": (80,), "proj_weight": (51, 80)},
    ),
}


def _inputs(op: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: (torch.randn(shape) * (shape[-1] ** -0.5 if "weight" in name else 2.0)).to(
            budget.DEVICE, dtype
        )
        for name, shape in OPS[op][1].items()
    }


def test_reference_is_the_distribution_function_of_a_normal() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    for impl in ("reference", "torch"):
        y = gelu(x, form="erf", impl=impl)
        (slope,) = torch.autograd.grad(y.sum(), x)
        for v, value, derivative in zip(x.tolist(), y.tolist(), slope.tolist(), strict=True):
            cdf = 0.5 * math.erfc(-v / math.sqrt(2))
            density = math.exp(-v * v / 2) / math.sqrt(2 * math.pi)
            assert value == pytest.approx(v * cdf, abs=1e-14)
            assert derivative == pytest.approx(cdf + v * density, abs=1e-14)


@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_within_budget(op: str, dtype: torch.dtype) -> None:
    """Each implementation is the other's measure; gold is the formula in fp64."""
    function = OPS[op][0]

    def run(impl: str, **inputs: Tensor) -> Tensor:
        return function(**inputs, form="erf", impl=impl)

    inputs = _inputs(op, dtype)
    budget.check_op(run, inputs, impl="torch", eager="reference")
    budget.check_op(run, inputs, impl="reference", eager="torch")


@pytest.mark.parametrize("op", OPS)
def test_it_is_not_the_tanh_form(op: str) -> None:
    function, inputs = OPS[op][0], _inputs(op, torch.float64)
    for impl in ("torch", "reference", "auto"):
        exact = function(**inputs, form="erf", impl=impl)
        tanh = function(**inputs, form="tanh", impl=impl)
        assert torch.equal(tanh, function(**inputs, impl=impl))
        assert 1e-4 < (exact - tanh).abs().max() < 1e-2


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(op))
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_the_kernels_on_a_gpu(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    play_architecture(monkeypatch, (9, 0))
    with FakeTensorMode(), _Calls() as calls:
        inputs = {name: torch.empty(shape, device="cuda") for name, shape in OPS[op][1].items()}
        OPS[op][0](**inputs, form="erf")
    assert "fastgpt2.gelu_fwd.default" in calls.names
    assert "aten.gelu.default" not in calls.names


@pytest.mark.parametrize("dtype", budget.dtype_grid(), ids=str)
@pytest.mark.parametrize("op", [*OPS, "linear_gelu fused"])
def test_triton_within_budget(op: str, dtype: torch.dtype) -> None:
    name, _, fused = op.partition(" ")
    options = {"fused": True} if fused else {}

    def run(impl: str, **inputs: Tensor) -> Tensor:
        return OPS[name][0](**inputs, form="erf", impl=impl, **options)

    budget.check_op(run, _inputs(name, dtype))


def test_triton_has_values_and_slopes_where_a_square_overflows() -> None:
    values = [-3e38, -1e20, -40.0, -0.0, 40.0, 1e20, 3e38]
    x = torch.tensor(values, device=budget.DEVICE, requires_grad=True)
    y = gelu(x, form="erf", impl="triton")
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == x.clamp(min=0.0).tolist()
    assert slope.tolist() == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]
