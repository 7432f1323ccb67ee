"""New tokens against the key/value cache: lengths, garbage after them, shared rows, the write."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels import decode_attention, tuning
from fastgpt2.kernels.decode_attention import _decode_attention
from fastgpt2.kernels.jit import decode_attention as jit
from tests.kernels import budget
from tests.kernels.budget import DEVICE
from tests.kernels.graphs import assert_graph_replays

# (B, T, H, S, D): one of each kind here, all of them on a GPU
SHAPES = budget.grid(
    [
        (1, 1, 2, 40, 64),
        (3, 1, 1, 37, 32),
        (2, 3, 2, 129, 80),
        (1, 4, 1, 65, 128),
        (2, 2, 1, 20, 12),
        (2, 21, 1, 21, 16),
    ],
    [
        (B, T, 12, S, D)
        for B in (1, 64)
        for T in (1, 5)
        for S in budget.LENGTHS
        for D in budget.HEAD_SIZES
        if T <= S
    ],
)


@pytest.fixture(params=["whole rows", "shared rows"])
def shares(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row by one program, and by as many as there are 16 keys in the cache."""
    keys = 10**9 if request.param == "whole rows" else 16
    monkeypatch.setattr(jit, "SHARE_KEYS", keys)
    monkeypatch.setattr(jit, "WHOLE_KEYS", keys)
    monkeypatch.setattr(jit, "PROGRAMS_PER_MULTIPROCESSOR", 100)


def _inputs(
    B: int,
    T: int,
    H: int,
    S: int,
    D: int,
    dtype: torch.dtype = torch.float32,
    *,
    full: bool = False,
) -> dict[str, Tensor]:
    """Caches of which each row has filled another part, one of them the whole."""
    before = S - T
    lengths = torch.full((B,), before) if full else torch.arange(B) * before // max(B, 1)
    lengths[:1] = before
    return {
        "q": torch.randn(B, T, H, D, device=DEVICE).to(dtype),
        "k_cache": torch.randn(B, H, S, D, device=DEVICE).to(dtype),
        "v_cache": torch.randn(B, H, S, D, device=DEVICE).to(dtype),
        "lengths": lengths.to(DEVICE),
    }


def _op(scale: float | None = None) -> Callable[..., Tensor]:
    def op(impl: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
        return decode_attention(q, k_cache, v_cache, lengths, scale=scale, impl=impl)

    return op


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize("dtype", budget.grid(budget.DTYPES, []), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_budget(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    # no tl.dot in these kernels, so that the interpreter gets bf16 right, too
    budget.check_op(_op(), _inputs(*shape, dtype), backward=False)


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize("scale", [0.05, 2.0])
def test_scale(scale: float) -> None:
    # scores in base 2 are rounded once more than eager's, which large ones show
    budget.check_op(_op(scale), _inputs(2, 2, 1, 50, 16), backward=False, roundings=4.0)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_other_implementations_are_within_budget(impl: str) -> None:
    eager = "reference" if impl == "torch" else "torch"
    budget.check_op(_op(), _inputs(3, 2, 2, 19, 16), impl=impl, eager=eager, backward=False)


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_what_lies_after_the_new_tokens_is_never_read(impl: str) -> None:
    inputs = _inputs(4, 3, 2, 70, 16)
    expected = _op()(impl, **inputs)
    for b, length in enumerate(inputs["lengths"].tolist()):
        inputs["k_cache"][b, :, length + 3 :] = float("nan")
        inputs["v_cache"][b, :, length + 3 :] = float("inf")
    assert torch.equal(_op()(impl, **inputs), expected)


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_the_first_token_of_a_row_sees_itself_alone(impl: str) -> None:
    inputs = _inputs(2, 2, 2, 40, 16) | {"lengths": torch.tensor([0, 38], device=DEVICE)}
    out = _op()(impl, **inputs)
    torch.testing.assert_close(out[0, 0], inputs["v_cache"][0, :, 0])


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_new_tokens_are_causal_among_themselves(impl: str) -> None:
    """Several tokens at once are what one token after the other gives."""
    inputs = _inputs(3, 4, 2, 37, 16)
    together = _op()(impl, **inputs)
    for t in range(4):
        step = inputs | {"q": inputs["q"][:, t : t + 1], "lengths": inputs["lengths"] + t}
        torch.testing.assert_close(_op()(impl, **step), together[:, t : t + 1])


@pytest.mark.usefixtures("shares")
def test_a_length_beyond_the_cache_reads_no_further() -> None:
    inputs = _inputs(2, 1, 1, 33, 16, full=True)
    expected = _op()("triton", **inputs)
    inputs["lengths"] = inputs["lengths"] + 100
    assert torch.equal(_op()("triton", **inputs), expected)


@pytest.mark.usefixtures("shares")
def test_large_scores_do_not_overflow() -> None:
    inputs = _inputs(1, 1, 1, 60, 32)
    inputs["q"] *= 1000
    budget.check_op(_op(), inputs, backward=False)


@pytest.mark.usefixtures("shares")
def test_very_negative_scores_are_not_taken_for_hidden_ones() -> None:
    inputs = _inputs(1, 1, 1, 40, 16)
    inputs["q"].fill_(1e6)
    inputs["k_cache"].fill_(-1e12)
    expected = inputs["v_cache"].mean(2)[:, None]
    torch.testing.assert_close(_op()("triton", **inputs), expected, atol=1e-5, rtol=1e-5)


def test_shares_are_not_counted_from_lengths_and_are_limited() -> None:
    # one row of 12 heads on 132 multiprocessors: as long as there are 64 keys for each
    assert [jit.count_shares(1, 12, S, 132) for S in (1, 256, 257, 1024, 10**6)] == [
        1,
        1,
        5,
        16,
        44,
    ]
    # enough programs without sharing
    assert jit.count_shares(64, 12, 10**6, 132) == 1
    assert jit.count_shares(1, 1, 10**6, 132) == jit.MAX_SHARES


@pytest.mark.usefixtures("shares")
def test_integer_lengths_of_any_kind() -> None:
    inputs = _inputs(3, 1, 1, 34, 16)
    expected = _op()("triton", **inputs)
    every_other = torch.stack([inputs["lengths"]] * 2, 1)[:, 0]
    for lengths in (inputs["lengths"].int(), every_other):
        assert torch.equal(_op()("triton", **(inputs | {"lengths": lengths})), expected)


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize("layout", ["packed", "part of a longer cache", "tokens first", "columns"])
def test_strided_inputs(layout: str) -> None:
    inputs = _inputs(2, 2, 3, 30, 16)
    expected = _op()("triton", **inputs)
    q, k, v = inputs["q"], inputs["k_cache"], inputs["v_cache"]
    if layout == "packed":
        inputs["q"] = torch.cat([q, q * 2, q * 3], 2)[:, :, :3]
    for name, x in (("k_cache", k), ("v_cache", v)):
        if layout == "part of a longer cache":
            inputs[name] = torch.cat([x, x * float("nan")], 2)[:, :, :30]
        elif layout == "tokens first":
            inputs[name] = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "columns":
            inputs[name] = torch.stack([x, -x], -1).flatten(-2)[..., ::2]
    assert torch.equal(_op()("triton", **inputs), expected)


@pytest.mark.parametrize(
    "config", tuning.candidates("decode_attention", D=64), ids=lambda c: c.label
)
def test_every_config_is_exact_on_integers(config: tuning.Config) -> None:
    # equal scores: the output is the mean of integers, over a power of two
    inputs = _inputs(2, 1, 2, 256, 64) | {"lengths": torch.tensor([255, 127], device=DEVICE)}
    inputs["q"].zero_()
    inputs["v_cache"] = torch.randint_like(inputs["v_cache"], -8, 9)
    expected = [inputs["v_cache"][b, :, :n].mean(1) for b, n in enumerate((256, 128))]
    with tuning.overriding("decode_attention", config):
        assert torch.equal(_op()("triton", **inputs), torch.stack(expected)[:, None])


@pytest.mark.parametrize(("B", "T", "S"), [(0, 1, 5), (2, 0, 5), (2, 1, 0)])
def test_nothing_to_do(B: int, T: int, S: int) -> None:
    out = _op()("triton", **_inputs(B, T, 2, S, 16))
    # without a cache there is no key, and zeros come out
    assert out.shape == (B, T, 2, 16) and not out.any()


@budget.rehearsed
def test_same_bits_a_thousand_times(full: bool) -> None:
    for B, H, S, times in (
        ((1, 12, 4096, 1000), (64, 12, 4096, 1000)) if full else ((2, 1, 300, 1),)
    ):
        inputs = _inputs(B, 1, H, S, 64, torch.bfloat16)
        expected = _op()("triton", **inputs)
        for _ in range(times):
            assert torch.equal(_op()("triton", **inputs), expected)


@budget.rehearsed
def test_offsets_beyond_32_bits(full: bool) -> None:
    # 2^31 elements and more of keys
    inputs = _inputs(2, 1, 1, 16, 64, torch.float16)
    keys = 2**24 + 16 if full else 40
    long = torch.empty(2, 1, keys, 64, dtype=torch.float16, device=DEVICE)
    expected = _op()("triton", **inputs)
    for name in ("k_cache", "v_cache"):
        long[:, :, -16:] = inputs[name]
        inputs[name] = long[:, :, -16:]
        assert torch.equal(_op()("triton", **inputs), expected)
        inputs[name] = inputs[name].contiguous()


@pytest.mark.parametrize("split", [False, True])
def test_opcheck(split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "WHOLE_KEYS", 8 if split else 1000)
    monkeypatch.setattr(jit, "SHARE_KEYS", 8)
    torch.library.opcheck(_decode_attention, (*_inputs(2, 3, 2, 20, 8).values(), 0.3))


def test_compiles_whole_at_two_lengths() -> None:
    torch.compiler.reset()
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    for S in (7, 30):
        inputs: dict[str, Any] = dict(_inputs(2, 1, 2, S, 8))
        expected = _op()("triton", **inputs)
        assert torch.equal(compiled(**inputs, impl="triton"), expected)


@budget.rehearsed
def test_a_captured_graph_follows_the_lengths(full: bool) -> None:
    B, H, S = (2, 12, 4096) if full else (2, 1, 300)
    inputs = _inputs(B, 1, H, S, 64, torch.bfloat16)
    inputs["lengths"].copy_(torch.tensor([0, S - 1]))
    # changing the inputs turns the rows around, lengths and all
    assert_graph_replays(lambda: [_op()("triton", **inputs)], list(inputs.values()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": 3.0}, TypeError, "q must be a tensor, got float"),
        ({"q": torch.ones(2, 1, 3, 8).long()}, TypeError, "q must be floating point"),
        ({"q": torch.ones(2, 8)}, ValueError, r"q must be \(B, T, H, D\), got shape \(2, 8\)"),
        ({"k_cache": torch.ones(2, 3, 8)}, ValueError, r"k_cache must be \(B, H, S, D\)"),
        (
            {"k_cache": torch.ones(2, 3, 5, 9)},
            ValueError,
            r"k_cache must have shape \(2, 3, 5, 8\)",
        ),
        (
            {"v_cache": torch.ones(2, 3, 6, 8)},
            ValueError,
            r"v_cache must have shape \(2, 3, 5, 8\)",
        ),
        ({"v_cache": torch.ones(2, 3, 5, 8).half()}, TypeError, r"v_cache must be torch\.float32"),
        ({"k_cache": torch.ones(2, 3, 5, 8, device="meta")}, ValueError, "k_cache must be on cpu"),
        ({"lengths": torch.ones(2)}, TypeError, "lengths must be int64 or int32"),
        ({"lengths": torch.ones(3).int()}, ValueError, r"lengths must have shape \(2,\)"),
        ({"scale": -1.0}, ValueError, "scale must be positive and finite, got -1.0"),
        ({"impl": "paged"}, ValueError, "impl must be one of auto, triton, torch, reference"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.ones(2, 1, 3, 8),
        "k_cache": torch.ones(2, 3, 5, 8),
        "v_cache": torch.ones(2, 3, 5, 8),
        "lengths": torch.tensor([1, 2]),
    }
    with pytest.raises(error, match=message):
        decode_attention(**(arguments | change))


def test_wide_heads_are_refused() -> None:
    inputs = {n: x.to(DEVICE) for n, x in _inputs(1, 1, 1, 4, 136).items()}
    with pytest.raises(RuntimeError, match="the kernels take heads up to 128, not 136"):
        _op()("triton", **inputs)
    assert _op()("auto", **inputs).shape == (1, 1, 1, 136)
