"""The erf form of every op with a GELU: the formula, PyTorch's operator, and no Triton kernel."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels import backend, bias_gelu, gelu, linear_gelu, mlp
from tests.kernels import budget

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
        name: (torch.randn(shape) * (shape[-1] ** -0.5 if "weight" in name else 2.0)).to(dtype)
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


@pytest.mark.parametrize("op", OPS)
def test_triton_by_name_refuses_it(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # whatever else would stop Triton here
    monkeypatch.setattr(backend, "_triton_obstacle", lambda x: None)
    with pytest.raises(RuntimeError) as error:
        OPS[op][0](**_inputs(op, torch.float32), form="erf", impl="triton")
    expected = f"{op}: impl='triton' cannot run: the kernels have the tanh GELU, not erf"
    assert str(error.value) == expected
