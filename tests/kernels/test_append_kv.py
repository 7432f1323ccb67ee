"""The write of new keys and values into the cache: where it goes, and that nothing else moves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels import append_kv
from fastgpt2.kernels.decode_attention import _append_kv
from tests.kernels import budget
from tests.kernels.budget import DEVICE
from tests.kernels.graphs import assert_graph_replays

IMPLS = ["triton", "torch", "reference"]


def _inputs(
    B: int, T: int, H: int, S: int, D: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Keys and values as a packed projection has them, and caches with something in them."""
    _, k, v = torch.randn(B, T, 3, H, D, device=DEVICE).to(dtype).unbind(2)
    caches = {n: torch.randn(B, H, S, D, device=DEVICE).to(dtype) for n in ("k_cache", "v_cache")}
    lengths = torch.arange(B, device=DEVICE) * 3 % (S - T + 1)
    return {**caches, "k": k, "v": v, "lengths": lengths}


def _expected(cache: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
    cache = cache.clone()
    for b, length in enumerate(lengths.tolist()):
        cache[b, :, length : length + new.shape[1]] = new[b].transpose(0, 1)
    return cache


@pytest.mark.parametrize("dtype", budget.grid(budget.DTYPES, []), ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 5, 8), (3, 1, 5, 7, 12), (2, 4, 3, 9, 16), (1, 3, 1, 3, 80)], ids=str
)
def test_the_caches_hold_the_new_tokens_and_nothing_else_moves(
    shape: tuple[int, int, int, int, int], impl: str, dtype: torch.dtype
) -> None:
    inputs = _inputs(*shape, dtype)
    wanted = [_expected(inputs[f"{n}_cache"], inputs[n], inputs["lengths"]) for n in ("k", "v")]
    kept = {n: inputs[n].clone() for n in ("k", "v", "lengths")}
    append_kv(**inputs, impl=impl)
    for name, cache in zip(("k_cache", "v_cache"), wanted, strict=True):
        assert torch.equal(inputs[name], cache)
    assert all(torch.equal(inputs[n], x) for n, x in kept.items())


@pytest.mark.parametrize("layout", ["tokens first", "part of a longer cache", "columns"])
def test_strided_inputs(layout: str) -> None:
    inputs = _inputs(2, 2, 3, 8, 16)
    wanted = _expected(inputs["k_cache"], inputs["k"], inputs["lengths"])
    if layout == "tokens first":
        inputs["k_cache"] = inputs["k_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "part of a longer cache":
        inputs["k_cache"] = torch.cat([inputs["k_cache"]] * 2, 2)[:, :, :8]
    else:
        inputs["k"] = torch.stack([inputs["k"], -inputs["k"]], -1).flatten(-2)[..., ::2]
    append_kv(**inputs, impl="triton")
    assert torch.equal(inputs["k_cache"], wanted)


@pytest.mark.parametrize("length", [-1, 4])
def test_nothing_is_written_outside_the_cache(length: int) -> None:
    inputs = _inputs(2, 1, 2, 4, 8)
    inputs["lengths"] = torch.tensor([length, 1], device=DEVICE, dtype=torch.int32)
    whole = torch.zeros(6, *inputs["k_cache"].shape[1:], device=DEVICE)
    # a row before and a row after the two: whoever writes past the end of a row writes there
    inputs["k_cache"] = whole[2:4]
    append_kv(**inputs, impl="triton")
    assert not whole[:3].any() and not whole[4:].any()
    assert torch.equal(whole[3, :, 1], inputs["k"][1, 0])


def test_no_gradient_reaches_the_cache() -> None:
    for impl in IMPLS:
        inputs = _inputs(1, 1, 2, 4, 8)
        inputs["k"] = inputs["k"].clone().requires_grad_()
        append_kv(**inputs, impl=impl)
        assert not inputs["k_cache"].requires_grad


def test_opcheck_and_compiled() -> None:
    torch.library.opcheck(_append_kv, tuple(_inputs(2, 2, 2, 6, 8).values()))
    torch.compiler.reset()
    compiled = torch.compile(append_kv, fullgraph=True, backend="aot_eager")
    inputs = _inputs(2, 1, 2, 6, 8)
    wanted = _expected(inputs["k_cache"], inputs["k"], inputs["lengths"])
    compiled(**inputs, impl="triton")
    assert torch.equal(inputs["k_cache"], wanted)


@budget.rehearsed
def test_a_captured_graph_follows_the_lengths(full: bool) -> None:
    inputs = _inputs(2, 1, 12 if full else 2, 64 if full else 6, 64, budget.HALF)

    def step() -> list[Tensor]:
        append_kv(**inputs, impl="triton")
        return [inputs["k_cache"].clone(), inputs["v_cache"].clone()]

    assert_graph_replays(step, [inputs["k"], inputs["v"], inputs["lengths"]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.ones(2, 3, 8)}, ValueError, r"k must be \(B, T, H, D\), got shape"),
        ({"v": torch.ones(2, 2, 3, 8)}, ValueError, r"v must have shape \(2, 1, 3, 8\)"),
        ({"v": torch.ones(2, 1, 3, 8).half()}, TypeError, r"v must be torch\.float32 like k"),
        ({"v_cache": torch.ones(2, 3, 5, 9)}, ValueError, r"v_cache must have shape"),
        (
            {"k_cache": torch.ones(2, 3, 5, 16)[..., ::2]},
            ValueError,
            "k_cache must have a contiguous last dimension, got stride 2",
        ),
        ({"lengths": torch.ones(2)}, TypeError, "lengths must be int64 or int32"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "k_cache": torch.ones(2, 3, 5, 8),
        "v_cache": torch.ones(2, 3, 5, 8),
        "k": torch.ones(2, 1, 3, 8),
        "v": torch.ones(2, 1, 3, 8),
        "lengths": torch.tensor([1, 2]),
    }
    with pytest.raises(error, match=message):
        append_kv(**(arguments | change))
