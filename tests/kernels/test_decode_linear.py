"""A linear layer of a few rows with its surroundings: each of them, alone and together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels import decode_linear, tuning
from fastgpt2.kernels.decode_linear import MAX_ROWS, _decode_linear
from tests.kernels import budget
from tests.kernels.budget import DEVICE
from tests.kernels.graphs import assert_graph_replays

# (B, C, F): one of each kind here, GPT-2's on a GPU
SHAPES = budget.grid(
    [(1, 48, 70), (3, 33, 65), (MAX_ROWS, 100, 7), (2, 1, 1)],
    [
        (B, C, F)
        for B in (1, 2, 4, 5, MAX_ROWS)
        for C, F in ((768, 2304), (768, 768), (3072, 768), (1600, 6400), (768, 50257))
    ],
)
# what stands around the product
NAMES = ("bias", "norm_weight", "norm_bias", "residual")


def _inputs(
    B: int, C: int, F: int, dtype: torch.dtype = torch.float32, names: tuple[str, ...] = NAMES
) -> dict[str, Any]:
    shapes = {
        "x": (B, C),
        "weight": (F, C),
        "bias": (F,),
        "scales": (F,),
        "norm_weight": (C,),
        "norm_bias": (C,),
        "residual": (B, F),
    }
    tensors: dict[str, Any] = {
        name: torch.randn(shapes[name], device=DEVICE).to(dtype) for name in ("x", "weight", *names)
    }
    # products of C terms of size 1
    tensors["weight"] /= C**0.5
    return tensors


def _op(form: str = "none", **options: Any) -> Callable[..., Tensor]:
    def op(impl: str, **tensors: Any) -> Tensor:
        return decode_linear(**tensors, form=form, impl=impl, **options)

    return op


@pytest.mark.parametrize("dtype", budget.grid(budget.DTYPES, []), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_budget(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    # no tl.dot in this kernel, so that the interpreter gets bf16 right, too
    budget.check_op(_op("tanh"), _inputs(*shape, dtype), backward=False)


@pytest.mark.parametrize("form", ["none", "tanh", "erf"])
@pytest.mark.parametrize(
    "names", [(), ("bias",), ("norm_weight",), ("norm_weight", "norm_bias"), ("residual",)], ids=str
)
def test_each_part_alone(names: tuple[str, ...], form: str) -> None:
    budget.check_op(_op(form, eps=0.1), _inputs(2, 40, 9, names=names), backward=False)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_other_implementations_are_within_budget(impl: str) -> None:
    eager = "reference" if impl == "torch" else "torch"
    inputs = _inputs(MAX_ROWS + 3, 24, 10)
    budget.check_op(_op("erf"), inputs, impl=impl, eager=eager, backward=False)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("dtype", budget.dtype_grid(), ids=str)
def test_int8_weights_and_their_scales(dtype: torch.dtype, B: int) -> None:
    inputs = _inputs(B, 70, 66, dtype, (*NAMES, "scales"))
    inputs["weight"] = torch.randint(-127, 128, (66, 70), dtype=torch.int8, device=DEVICE)
    inputs["scales"] = torch.rand(66, device=DEVICE) / 500
    budget.check_op(_op("tanh"), inputs, backward=False)


def test_rows_far_from_zero_are_normalised_exactly() -> None:
    inputs = _inputs(2, 64, 8)
    inputs["x"] += 1000.0
    budget.check_op(_op(), inputs, backward=False)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_the_dtype_is_that_of_the_residual_or_the_one_asked_for(impl: str) -> None:
    inputs = _inputs(2, 16, 5, torch.float16)
    assert decode_linear(**inputs, impl=impl).dtype == torch.float16
    inputs["residual"] = inputs["residual"].float()
    assert decode_linear(**inputs, impl=impl).dtype == torch.float32
    # an fp32 stream in, activations out
    inputs |= {"x": inputs["x"].float()}
    found = decode_linear(**inputs, dtype=torch.float16, impl=impl)
    wide = {name: x.double() for name, x in inputs.items()}
    expected = decode_linear(**wide, impl="reference")
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("layout", ["rows apart", "columns apart"])
def test_strided_inputs(layout: str) -> None:
    inputs = _inputs(3, 40, 9)
    expected = _op()("triton", **inputs)
    for name in ("x", "weight", "residual"):
        x = inputs[name]
        apart = torch.cat([x, x + 1], 1)[:, : x.shape[1]]
        inputs[name] = apart if layout == "rows apart" else torch.stack([x, -x], -1)[..., 0]
    assert torch.equal(_op()("triton", **inputs), expected)


@pytest.mark.parametrize(
    "config",
    dict.fromkeys(
        config
        for rows in (1, 4, 8)
        for size in (1, 2)
        for config in tuning.candidates("decode_linear", rows=rows, F=768, bytes=size)
    ),
    ids=lambda c: c.label,
)
def test_every_config_is_exact_on_integers(config: tuning.Config) -> None:
    x, weight = (torch.randint(-8, 9, s, device=DEVICE).float() for s in ((5, 300), (19, 300)))
    with tuning.overriding("decode_linear", config):
        assert torch.equal(decode_linear(x, weight, impl="triton"), x @ weight.t())


def test_nothing_to_do() -> None:
    assert decode_linear(torch.ones(0, 4), torch.ones(3, 4), impl="torch").shape == (0, 3)
    x, weight = torch.ones(0, 4, device=DEVICE), torch.ones(3, 4, device=DEVICE)
    assert decode_linear(x, weight, impl="triton").shape == (0, 3)
    assert decode_linear(weight, x, impl="triton").shape == (3, 0)


def test_same_bits_twice() -> None:
    inputs = _inputs(2, 40, 9)
    assert torch.equal(_op()("triton", **inputs), _op()("triton", **inputs))


def test_opcheck_and_compiled() -> None:
    inputs = _inputs(2, 20, 6)
    tensors = (inputs["x"], inputs["weight"], None, *(inputs[name] for name in NAMES))
    torch.library.opcheck(_decode_linear, (*tensors, 1e-5, "tanh", torch.float16))
    torch.compiler.reset()
    compiled = torch.compile(decode_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs, impl="triton"), _op()("triton", **inputs))


@budget.rehearsed
def test_a_captured_graph_follows_its_inputs(full: bool) -> None:
    inputs = _inputs(2, 768 if full else 20, 2304 if full else 6, budget.HALF)
    assert_graph_replays(lambda: [_op("tanh")("triton", **inputs)], list(inputs.values()))


def test_many_rows_are_the_librarys() -> None:
    inputs = _inputs(MAX_ROWS + 1, 8, 4)
    with pytest.raises(RuntimeError, match="made for up to 8 rows, not 9"):
        _op()("triton", **inputs)
    assert _op()("auto", **inputs).shape == (MAX_ROWS + 1, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 3, 8)}, ValueError, r"x must be \(B, C\), got shape \(2, 3, 8\)"),
        ({"weight": torch.ones(4, 9)}, ValueError, r"weight must have shape \(4, 8\)"),
        ({"weight": torch.ones(4, 8).short()}, TypeError, "weight must be floating point or int8"),
        ({"scales": torch.ones(3)}, ValueError, r"scales must have shape \(4,\)"),
        ({"norm_weight": torch.ones(4)}, ValueError, r"norm_weight must have shape \(8,\)"),
        ({"norm_bias": torch.ones(8)}, ValueError, "norm_bias must be None without norm_weight"),
        ({"residual": torch.ones(2, 8)}, ValueError, r"residual must have shape \(2, 4\)"),
        ({"dtype": torch.int8}, TypeError, "dtype must be floating point, got torch.int8"),
        ({"form": "relu"}, ValueError, "form must be one of tanh, erf, none, got 'relu'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(2, 8), "weight": torch.ones(4, 8)}
    with pytest.raises(error, match=f"decode_linear: {message}"):
        decode_linear(**(arguments | change))
