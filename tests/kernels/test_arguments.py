"""Every public op answers every kind of wrong argument with one error that names both."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2 import kernels

NAN = float("nan")
# public names that are not ops
OTHERS = {"Impl", "explain", "use_impl"}
# of these, a scalar and no elements at all are inputs like any other
ELEMENTWISE = {"gelu"}
# the message of PyTorch, or ours, if there is no second derivative
REFUSALS = (
    "no autograd formula was registered",
    "double backward is not supported",
    "is not implemented",
)
# wrong values, the error's type, and what it says of the option
OPTIONS: dict[str, list[tuple[Any, type[Exception], str]]] = {
    "dropout_p": [(p, ValueError, "must be in [0, 1)") for p in (-0.1, 1.0, NAN)],
    "seed": [
        (1.5, TypeError, "must be an integer"),
        (2**63, ValueError, "must fit into 64 bits"),
        (torch.tensor(1.5), TypeError, "must be int64 or int32"),
        (torch.tensor([1, 2]), ValueError, "must be a scalar"),
    ],
    "eps": [(v, ValueError, "must be positive and finite") for v in (0.0, -1.0, NAN, math.inf)],
    "scale": [(v, ValueError, "must be positive and finite") for v in (0.0, -1.0, NAN, math.inf)],
    "label_smoothing": [(s, ValueError, "must be in [0, 1)") for s in (-0.1, 1.0, NAN)],
    "z_loss": [(v, ValueError, "must be finite and not negative") for v in (-0.1, NAN, math.inf)],
    "vocab_size": [(2.5, TypeError, "must be an integer"), (0, ValueError, "must be in [1, ")],
    "n_head": [(2.0, TypeError, "must be an integer"), (0, ValueError, "n_head=0")],
    "dtype": [(torch.int64, TypeError, "must be floating point")],
    "form": [("none", ValueError, "must be one of tanh, erf")],
    "impl": [("cuda", ValueError, "must be one of auto, triton, torch, reference")],
}


@dataclass(frozen=True)
class Contract:
    """An op's arguments: shapes of the tensors, the first one's device is everyone's; options."""

    floating: dict[str, tuple[int, ...]]
    integer: dict[str, tuple[int, ...]] = field(default_factory=dict)
    options: tuple[str, ...] = ("impl",)
    given: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Some that are right."""
        tensors = {name: torch.randn(shape) for name, shape in self.floating.items()}
        tensors |= {name: torch.zeros(shape).long() for name, shape in self.integer.items()}
        return tensors | self.given


_DROPOUT = ("dropout_p", "seed", "impl")
_LOSS = ("vocab_size", "label_smoothing", "z_loss", "impl")
_GELU = ("form", "impl")
_AFFINE = {"x": (2, 8), "weight": (8,), "bias": (8,)}
_EMBEDDING = Contract(
    {"wte": (9, 8), "wpe": (6, 8)},
    {"idx": (2, 5), "positions": (5,)},
    ("dtype", *_DROPOUT),
)
CONTRACTS: dict[str, Contract] = {
    "add_branch": Contract({"x": (2, 8), "branch": (2, 8), "branch_bias": (8,)}, options=_DROPOUT),
    "add_layer_norm": Contract(
        {**_AFFINE, "branch": (2, 8), "branch_bias": (8,)}, options=("eps", *_DROPOUT)
    ),
    "append_kv": Contract(
        {"k": (2, 1, 3, 8), "v": (2, 1, 3, 8), "k_cache": (2, 3, 5, 8), "v_cache": (2, 3, 5, 8)},
        {"lengths": (2,)},
    ),
    "attention": Contract(
        {"qkv": (2, 6, 48)},
        {"segment_ids": (2, 6), "key_range": (2, 2)},
        ("n_head", "scale", *_DROPOUT),
        {"n_head": 2},
    ),
    "bias_gelu": Contract({"x": (2, 8), "bias": (8,)}, options=_GELU),
    "cross_entropy": Contract({"logits": (2, 8)}, {"targets": (2,)}, _LOSS),
    "decode_attention": Contract(
        {"q": (2, 1, 3, 8), "k_cache": (2, 3, 5, 8), "v_cache": (2, 3, 5, 8)},
        {"lengths": (2,)},
        ("scale", "impl"),
    ),
    "decode_greedy": Contract(
        {"logits": (2, 9), "tops": (2, 2), "recent": (2, 3, 2)},
        {"tokens": (2,), "lengths": (2,), "steps": (2,)},
    ),
    "decode_head": Contract(
        {
            **{"x": (2, 8), "weight": (9, 8), "bias": (9,), "scales": (9,)},
            **{"norm_weight": (8,), "norm_bias": (8,)},
        },
        options=("eps", "dtype", "impl"),
    ),
    "decode_linear": Contract(
        {
            **{"x": (2, 8), "weight": (9, 8), "bias": (9,), "scales": (9,), "residual": (2, 9)},
            **{"norm_weight": (8,), "norm_bias": (8,)},
        },
        options=("eps", "dtype", "impl"),
    ),
    "decode_qkv": Contract(
        {
            **{"x": (2, 8), "weight": (72, 8), "bias": (72,), "scales": (72,)},
            **{"k_cache": (2, 3, 5, 8), "v_cache": (2, 3, 5, 8)},
            **{"norm_weight": (8,), "norm_bias": (8,)},
        },
        {"lengths": (2,)},
        ("eps", "impl"),
    ),
    "embedding": _EMBEDDING,
    "gelu": Contract({"x": (2, 8)}, options=_GELU),
    "layer_norm": Contract(_AFFINE, options=("eps", "impl")),
    "linear": Contract({"x": (2, 8), "weight": (9, 8), "bias": (9,)}, options=()),
    "linear_cross_entropy": Contract({"x": (2, 8), "weight": (9, 8)}, {"targets": (2,)}, _LOSS),
    "linear_fp8": Contract({"x": (2, 16), "weight": (32, 16), "bias": (32,)}),
    "linear_gelu": Contract({"x": (2, 8), "weight": (9, 8), "bias": (9,)}, options=_GELU),
    "mlp": Contract(
        {"x": (2, 8), "fc_weight": (9, 8), "fc_bias": (9,), "proj_weight": (7, 9)}, options=_GELU
    ),
    "stream_layer_norm": Contract(_AFFINE, options=("eps", "impl")),
    "tied_embedding": _EMBEDDING,
}

Case = tuple[str, dict[str, Any], type[Exception], str]


def _wrong_tensors(op: str, contract: Contract) -> Iterator[Case]:
    first = next(iter(contract.floating))
    for name, shape in (contract.floating | contract.integer).items():
        is_floating = name in contract.floating
        right, wrong = torch.randn(shape), torch.zeros(shape).long()
        kind = "must be floating point"
        if not is_floating:
            right, wrong, kind = wrong, right, "must be int64 or int32"
        elif name.endswith("_cache") and op != "decode_qkv":
            kind = f"must be torch.float32 like {first}, got torch.int64"
        yield f"{name} list", {name: [1.0]}, TypeError, f"{name} must be a tensor, got list"
        yield f"{name} dtype", {name: wrong}, TypeError, f"{name} {kind}"
        if name != first:
            said = f"{name} must be on cpu, got meta"
            yield f"{name} device", {name: right.to("meta")}, ValueError, said
        if op not in ELEMENTWISE:
            yield f"{name} scalar", {name: right.new_zeros(())}, ValueError, name
            empty = right.new_zeros((*shape[:-1], 0))
            yield f"{name} empty", {name: empty}, ValueError, name


def _cases() -> list[Any]:
    cases = []
    for op, contract in CONTRACTS.items():
        wrong = list(_wrong_tensors(op, contract))
        for name in contract.options:
            wrong += [
                (f"{name} {value}", {name: value}, error, said)
                for value, error, said in OPTIONS[name]
            ]
        cases += [pytest.param(op, *case[1:], id=f"{op}-{case[0]}") for case in wrong]
    return cases


def _call(op: str, **changes: Any) -> Any:
    return getattr(kernels, op)(**(CONTRACTS[op].arguments() | changes))


def test_every_public_op_has_a_contract_here() -> None:
    assert set(CONTRACTS) == set(kernels.__all__) - OTHERS


@pytest.mark.parametrize("op", CONTRACTS)
def test_right_arguments_are_taken(op: str) -> None:
    _call(op)
    optional = {name: torch.tensor(3) for name in CONTRACTS[op].options if name == "seed"}
    _call(op, **(optional | ({"dropout_p": 0.5} if optional else {})))


@pytest.mark.parametrize(("op", "change", "error", "said"), _cases())
def test_wrong_arguments_are_named(
    op: str, change: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error) as raised:
        _call(op, **change)
    message = str(raised.value)
    assert message.startswith(f"{op}: ")
    assert "\n" not in message
    assert said in message
    assert "got" in message
    assert all(name in message for name in change)


def test_gelu_takes_any_shape() -> None:
    for shape in ((), (0,), (2, 0)):
        assert kernels.gelu(torch.zeros(shape)).shape == shape


def test_linear_over_nothing_is_its_bias() -> None:
    bias = torch.randn(3)
    found = kernels.linear(torch.zeros(2, 0), torch.zeros(3, 0), bias)
    assert torch.equal(found, bias.expand(2, 3))


def test_linear_wants_one_dtype_but_under_autocast() -> None:
    x, weight = torch.randn(2, 8).bfloat16(), torch.randn(9, 8)
    with pytest.raises(TypeError, match=r"linear: weight must be torch\.bfloat16 like x"):
        kernels.linear(x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernels.linear(x, weight).dtype == torch.bfloat16


NO_GRADIENT = {name for name in CONTRACTS if name.startswith("decode_")} | {"append_kv"}
DIFFERENTIABLE = sorted(set(CONTRACTS) - NO_GRADIENT)


def _gradients(op: str, impl: str, create_graph: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that ``op`` has, and by each the gradient of a sum of weighed squares."""
    torch.manual_seed(1)
    contract = CONTRACTS[op]
    arguments = contract.arguments()
    leaves = [arguments[name].requires_grad_() for name in contract.floating]
    if contract.options:
        arguments["impl"] = impl
    outputs = getattr(kernels, op)(**arguments)
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    weighed = [(x.square() * torch.randn_like(x)).sum() for x in tensors if x.requires_grad]
    return leaves, list(torch.autograd.grad(sum(weighed), leaves, create_graph=create_graph))


def _second_order(op: str, impl: str) -> list[Tensor]:
    """Gradients of the sum of squares of every gradient of ``op``, by the tensors it has."""
    leaves, first = _gradients(op, impl, create_graph=True)
    squares = sum(dx.square().sum() for dx in first)
    assert isinstance(squares, Tensor)
    return list(torch.autograd.grad(squares, leaves, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_a_graph_changes_no_gradient(op: str, impl: str) -> None:
    for plain, found in zip(
        *(_gradients(op, impl, create_graph=wanted)[1] for wanted in (False, True)), strict=True
    ):
        torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_a_gradient_of_the_gradient_is_right_or_refused(op: str, impl: str) -> None:
    try:
        found = _second_order(op, impl)
    except RuntimeError as error:
        assert any(said in str(error) for said in REFUSALS), error
        return
    for got, expected in zip(found, _second_order(op, "reference"), strict=True):
        # two derivatives of fp32 roundings; a missing term is as large as the rest
        assert (got - expected).norm() <= 1e-4 * expected.norm()
