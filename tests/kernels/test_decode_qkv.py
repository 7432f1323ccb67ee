"""Queries, keys and values of new tokens: the numbers, and where keys and values go."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels import decode_qkv, tuning
from fastgpt2.kernels.decode_linear import MAX_ROWS
from fastgpt2.kernels.decode_qkv import _decode_qkv
from tests.kernels import budget
from tests.kernels.budget import DEVICE, Outputs
from tests.kernels.graphs import assert_graph_replays

IMPLS = ["triton", "torch", "reference"]
# (B, C, H, D): on the interpreter 64 or 32 features a program, so that it ends within a head
SHAPES = budget.grid(
    [(1, 33, 2, 16), (3, 40, 5, 9), (MAX_ROWS, 17, 1, 80), (2, 24, 3, 32)],
    [(B, C, H, 64) for B in (1, 2, 4, MAX_ROWS) for C, H in ((768, 12), (1600, 25))],
)
_S = 7


def _inputs(
    B: int, C: int, H: int, D: int, dtype: torch.dtype = torch.float32, S: int = _S
) -> dict[str, Any]:
    """Random weights, caches with something in them, lengths from 0 to S: some rows are full."""
    F = 3 * H * D
    shapes = {
        **{"x": (B, C), "weight": (F, C), "bias": (F,), "norm_weight": (C,), "norm_bias": (C,)},
        **{"k_cache": (B, H, S, D), "v_cache": (B, H, S, D)},
    }
    inputs: dict[str, Any] = {
        name: torch.randn(shape, device=DEVICE).to(dtype) for name, shape in shapes.items()
    }
    # products of C terms of size 1
    inputs["weight"] /= C**0.5
    return inputs | {"lengths": torch.arange(B, device=DEVICE) * (S + 2) % (S + 1)}


def _op(**options: Any) -> Callable[..., Outputs]:
    def op(impl: str, **inputs: Any) -> Outputs:
        caches = {name: inputs[name].clone() for name in ("k_cache", "v_cache")}
        q = decode_qkv(**(inputs | caches), impl=impl, **options)
        return q, *caches.values()

    return op


@pytest.mark.parametrize("dtype", budget.grid(budget.DTYPES, []), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_budget(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    budget.check_op(_op(eps=0.1), _inputs(*shape, dtype), backward=False)


@pytest.mark.parametrize("dtype", budget.dtype_grid(), ids=str)
def test_int8_weights_and_their_scales(dtype: torch.dtype) -> None:
    inputs = _inputs(3, 40, 2, 16, dtype)
    inputs["weight"] = torch.randint(-127, 128, (96, 40), dtype=torch.int8, device=DEVICE)
    inputs["scales"] = torch.rand(96, device=DEVICE) / 500
    budget.check_op(_op(), inputs, backward=False)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_fp32_stream_fills_caches_of_16_bits(impl: str) -> None:
    inputs = _inputs(2, 24, 2, 16, torch.float16)
    inputs["x"] = inputs["x"].float()
    gold = _op()("reference", **{n: t.double() if n != "lengths" else t for n, t in inputs.items()})
    for found, wanted in zip(_op()(impl, **inputs), gold, strict=True):
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.double(), wanted, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_the_new_tokens_places_change(impl: str) -> None:
    inputs = _inputs(3, 24, 2, 16)
    inputs["lengths"] = torch.tensor([2, _S, _S - 1], device=DEVICE, dtype=torch.int32)
    _, *caches = _op()(impl, **inputs)
    for name, found in zip(("k_cache", "v_cache"), caches, strict=True):
        changed = (found != inputs[name]).any(-1).any(1)
        assert changed.nonzero().tolist() == [[0, 2], [2, _S - 1]]


@pytest.mark.parametrize("length", [-1, 4, 5])
def test_nothing_is_written_outside_the_cache(length: int) -> None:
    inputs = _inputs(2, 12, 2, 8, S=4)
    inputs["lengths"] = torch.tensor([length, 1], device=DEVICE)
    whole = torch.zeros(6, 2, 4, 8, device=DEVICE)
    # rows before and after the two: whoever writes past the end of a row writes there
    inputs["k_cache"], inputs["v_cache"] = whole[2:4], torch.zeros(2, 2, 4, 8, device=DEVICE)
    decode_qkv(**inputs, impl="triton")
    assert not whole[:3].any() and not whole[4:].any()
    assert whole[3, :, 1].all() and not whole[3, :, 2:].any()
    assert not inputs["v_cache"][0].any()


@pytest.mark.parametrize("layout", ["rows apart", "columns apart", "tokens first", "longer cache"])
def test_strided_inputs(layout: str) -> None:
    inputs = _inputs(3, 40, 2, 16)
    expected = _op()("triton", **inputs)
    for name in ("x", "weight") if layout.endswith("apart") else ("k_cache", "v_cache"):
        x = inputs[name]
        if layout == "rows apart":
            inputs[name] = torch.cat([x, x + 1], 1)[:, : x.shape[1]]
        elif layout == "columns apart":
            inputs[name] = torch.stack([x, -x], -1)[..., 0]
        elif layout == "tokens first":
            inputs[name] = x.transpose(1, 2).contiguous().transpose(1, 2)
        else:
            # each of another length, so that each has strides of its own
            inputs[name] = torch.cat([x] * (2 if name == "k_cache" else 3), 2)[:, :, :_S]
    found = decode_qkv(**inputs, impl="triton")
    for got, wanted in zip((found, inputs["k_cache"], inputs["v_cache"]), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_every_config_is_exact_on_integers(rows: int) -> None:
    B, H, D = 5, 2, 12
    x, weight = (torch.randint(-8, 9, s, device=DEVICE).float() for s in ((B, 50), (72, 50)))
    k_cache, v_cache = torch.zeros(2, B, H, 1, D, device=DEVICE)
    lengths = torch.zeros(B, dtype=torch.int64, device=DEVICE)
    wanted = (x @ weight.t()).view(B, 3, H, D).unbind(1)
    for config in tuning.candidates("decode_linear", rows=rows, F=72, bytes=4):
        with tuning.overriding("decode_linear", config):
            q = decode_qkv(x, weight, None, k_cache, v_cache, lengths, impl="triton")
        for got, expected in zip((q, k_cache[:, :, 0], v_cache[:, :, 0]), wanted, strict=True):
            assert torch.equal(got, expected)


def test_no_gradient_reaches_the_cache() -> None:
    for impl in IMPLS:
        inputs = _inputs(1, 8, 2, 4)
        inputs["x"].requires_grad_()
        inputs["weight"].requires_grad_()
        q = decode_qkv(**inputs, impl=impl)
        assert not q.requires_grad and not inputs["k_cache"].requires_grad


def test_nothing_to_do() -> None:
    for impl in IMPLS:
        assert _op()(impl, **_inputs(0, 8, 2, 4))[0].shape == (0, 2, 4)


def test_opcheck_and_compiled() -> None:
    inputs = _inputs(2, 20, 2, 8)
    names = ("bias", "norm_weight", "norm_bias", "k_cache", "v_cache", "lengths")
    tensors = (inputs["x"], inputs["weight"], None, *(inputs[name] for name in names))
    torch.library.opcheck(_decode_qkv, (*tensors, 1e-5))
    torch.compiler.reset()
    compiled = torch.compile(decode_qkv, fullgraph=True, backend="aot_eager")
    expected = _op()("triton", **inputs)
    found = compiled(**inputs, impl="triton"), inputs["k_cache"], inputs["v_cache"]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@budget.rehearsed
def test_a_captured_graph_follows_the_lengths(full: bool) -> None:
    shape = (2, 768, 12, 64) if full else (2, 20, 2, 8)
    inputs = _inputs(*shape, budget.HALF)

    def step() -> list[Tensor]:
        q = decode_qkv(**inputs, impl="triton")
        return [q, inputs["k_cache"].clone(), inputs["v_cache"].clone()]

    assert_graph_replays(step, [inputs["x"], inputs["lengths"]])


def test_many_rows_are_the_librarys() -> None:
    inputs = _inputs(MAX_ROWS + 1, 8, 2, 4)
    with pytest.raises(RuntimeError, match="made for up to 8 rows, not 9"):
        _op()("triton", **inputs)
    found, wanted = (_op()(impl, **inputs) for impl in ("auto", "reference"))
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 3, 8)}, ValueError, r"x must be \(B, C\), got shape \(2, 3, 8\)"),
        ({"x": torch.ones(3, 8)}, ValueError, r"k_cache must have shape \(3, 3, 5, 4\)"),
        ({"weight": torch.ones(24, 8)}, ValueError, r"weight must have shape \(36, 8\) to match k"),
        ({"bias": torch.ones(12)}, ValueError, r"bias must have shape \(36,\)"),
        ({"k_cache": torch.ones(2, 3, 4)}, ValueError, r"k_cache must be \(B, H, S, D\)"),
        (
            {"v_cache": torch.ones(2, 3, 5, 4).half()},
            TypeError,
            r"v_cache must be torch\.float32 like k_cache, got torch\.float16",
        ),
        (
            {"k_cache": torch.ones(2, 3, 5, 8)[..., ::2]},
            ValueError,
            "k_cache must have a contiguous last dimension, got stride 2",
        ),
        ({"lengths": torch.ones(2)}, TypeError, "lengths must be int64 or int32"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        **{"x": torch.ones(2, 8), "weight": torch.ones(36, 8), "bias": None},
        **{"k_cache": torch.ones(2, 3, 5, 4), "v_cache": torch.ones(2, 3, 5, 4)},
        "lengths": torch.tensor([1, 2]),
    }
    with pytest.raises(error, match=f"decode_qkv: {message}"):
        decode_qkv(**(arguments | change))
