"""The MLP as one op: against fp64, and what it saves."""

import importlib

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels import linear_gelu, mlp
from fastgpt2.kernels.jit import gelu as jit
from fastgpt2.kernels.mlp import _mlp_fwd
from tests.kernels import budget
from tests.kernels.budget import DEVICE
from tests.kernels.graphs import assert_compiles_whole, assert_graph_replays
from tests.kernels.layouts import LAYOUTS, lay_out

# the package exports the function under its module's name
op_module = importlib.import_module("fastgpt2.kernels.mlp")

# (rows, width, MLP width)
SHAPES = budget.grid(
    [(1, 33, 20), (37, 48, 80), (70, 16, 17)],
    [(N, C, 4 * C) for N in budget.ROWS for C in (768, 1600)],
)


def _inputs(N: int, C: int, F: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "x": torch.randn(N, C, device=DEVICE).to(dtype),
        "fc_weight": (torch.randn(F, C, device=DEVICE) / C**0.5).to(dtype),
        "fc_bias": torch.randn(F, device=DEVICE).to(dtype),
        # not C of them: an op that mixes them up is found
        "proj_weight": (torch.randn(C + 3, F, device=DEVICE) / F**0.5).to(dtype),
    }


def _op(
    impl: str, x: Tensor, fc_weight: Tensor, proj_weight: Tensor, fc_bias: Tensor | None = None
) -> Tensor:
    return mlp(x, fc_weight, fc_bias, proj_weight, impl=impl)


@pytest.mark.parametrize("dtype", budget.dtype_grid(), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_budget(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    budget.check_op(_op, _inputs(*shape, dtype))


def test_bias_is_optional() -> None:
    inputs = _inputs(37, 48, 80, torch.float32)
    del inputs["fc_bias"]
    budget.check_op(_op, inputs)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_other_implementations_are_within_budget(impl: str) -> None:
    # each is the other's measure
    eager = "reference" if impl == "torch" else "torch"
    budget.check_op(_op, _inputs(37, 48, 80, torch.float32), impl=impl, eager=eager)


def test_backward_makes_the_very_gelu_of_forward() -> None:
    z, bias = torch.randn(37, 80, device=DEVICE).half(), torch.randn(80, device=DEVICE).half()
    dy = torch.randn_like(z)
    dz, dbias, y = jit.launch_bwd_with_y(dy, z, bias, "tanh")
    assert torch.equal(y, jit.launch_fwd(z, bias, "tanh"))
    for got, expected in zip((dz, dbias), jit.launch_bwd(dy, z, bias, "tanh"), strict=True):
        assert torch.equal(got, expected)


def test_saves_the_pre_activation_and_no_gelu() -> None:
    N, C, F = 37, 48, 80
    saved: dict[str, int] = {}
    for impl in ("triton", "torch"):
        leaves = {n: t.requires_grad_() for n, t in _inputs(N, C, F, torch.float32).items()}
        weights = {t.data_ptr() for n, t in leaves.items() if n != "x"}
        sizes: dict[int, int] = {}

        def pack(t: Tensor, known: set[int] = weights, sizes: dict[int, int] = sizes) -> Tensor:
            if t.data_ptr() not in known:
                sizes[t.untyped_storage().data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = _op(impl, **leaves)
        saved[impl] = sum(sizes.values())
        del y
    assert saved == {"triton": N * (C + F), "torch": N * (C + 2 * F)}


def test_without_a_gradient_it_is_its_parts() -> None:
    inputs = _inputs(7, 16, 20, torch.float32)
    hidden = linear_gelu(*(inputs[n] for n in ("x", "fc_weight", "fc_bias")), impl="triton")
    # the library that multiplies here need not be the one that ``linear`` takes
    torch.testing.assert_close(_op("triton", **inputs), hidden @ inputs["proj_weight"].T)


def test_parameters_in_fp32_keep_their_gradients_dtype() -> None:
    inputs = _inputs(7, 16, 20, torch.float16)
    inputs |= {n: inputs[n].float() for n in ("fc_weight", "fc_bias", "proj_weight")}
    budget.check_op(_op, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x", "fc_weight", "proj_weight", "dy"])
def test_strided_inputs(name: str, layout: str) -> None:
    inputs = _inputs(6, 16, 20, torch.float32) | {"dy": torch.randn(6, 19, device=DEVICE)}
    results = []
    for given in (inputs, inputs | {name: lay_out(inputs[name], layout)}):
        leaves = {n: t.detach().requires_grad_() for n, t in given.items() if n != "dy"}
        y = _op("triton", **leaves)
        results.append([y, *torch.autograd.grad(y, list(leaves.values()), given["dy"])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", ["x", "fc_weight", "fc_bias", "proj_weight"])
def test_frozen_inputs(frozen: str) -> None:
    inputs = _inputs(7, 16, 20, torch.float32)
    gradients = []
    for impl in ("triton", "reference"):
        leaves = {n: t.clone().requires_grad_(n != frozen) for n, t in inputs.items()}
        wanted = [t for t in leaves.values() if t.requires_grad]
        gradients.append(torch.autograd.grad(_op(impl, **leaves).sum(), wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(16,), (2, 3, 16), (0, 16), (2, 0, 16)], ids=str)
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    inputs = _inputs(6, 16, 20, torch.float32)
    inputs["x"] = torch.randn(shape, device=DEVICE)
    found = []
    for impl in ("triton", "reference"):
        leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
        y = _op(impl, **leaves)
        assert y.shape == (*shape[:-1], 19)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@budget.rehearsed
@pytest.mark.parametrize("dtype", budget.dtype_grid(), ids=str)
def test_same_bits_a_thousand_times(dtype: torch.dtype, full: bool) -> None:
    shape = (1023, 768, 3072) if full else (37, 48, 80)
    budget.assert_repeatable(_op, _inputs(*shape, dtype), times=1000 if full else 2)


def test_opcheck() -> None:
    leaves = [t.requires_grad_() for t in _inputs(5, 16, 20, torch.float32).values()]
    torch.library.opcheck(_mlp_fwd, (*leaves, "tanh"))
    torch.library.opcheck(_mlp_fwd, (leaves[0], leaves[1], None, leaves[3], "erf"))
    z, dy = torch.randn(5, 20, device=DEVICE), torch.randn(5, 20, device=DEVICE)
    for bias in (None, torch.randn(20, device=DEVICE)):
        torch.library.opcheck(op_module._gelu_again_bwd, (dy, z, bias, "tanh"))


def test_compiles_whole_at_two_lengths() -> None:
    def step(**inputs: Tensor) -> Tensor:
        return _op("triton", **inputs)

    assert_compiles_whole(step, [_inputs(N, 16, 20, torch.float32) for N in (4, 9)])


@budget.rehearsed
def test_cuda_graph(full: bool) -> None:
    inputs = _inputs(*((1023, 768, 3072) if full else (7, 16, 20)), torch.float16)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}

    def step() -> list[Tensor]:
        y = _op("triton", **leaves)
        return [y, *torch.autograd.grad(y, list(leaves.values()), y)]

    assert_graph_replays(step, [leaves["x"]])


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"x": torch.ones(3, 16, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({"x": torch.ones(())}, ValueError, "x must have a last dimension"),
        ({"x": torch.ones(3, 15)}, ValueError, "fc_weight must have shape (20, 15)"),
        ({"fc_weight": torch.ones(20)}, ValueError, "fc_weight must be (F, C)"),
        ({"fc_bias": torch.ones(19)}, ValueError, "fc_bias must have shape (20,)"),
        ({"proj_weight": torch.ones(16, 21)}, ValueError, "proj_weight must have shape (16, 20)"),
        ({"proj_weight": torch.ones(16)}, ValueError, "proj_weight must be (C', F)"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_mistakes_name_the_argument(
    change: dict[str, Tensor], error: type[Exception], said: str
) -> None:
    with pytest.raises(error) as raised:
        _op("torch", **(_inputs(3, 16, 20, torch.float32) | change))
    assert said in str(raised.value)
