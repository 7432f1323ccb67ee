"""Causal attention: every implementation against fp64, forward and backward, with every option."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels import philox, tuning
from fastgpt2.kernels.attention import _attention_bwd, _attention_fwd, _dropout_bits, attention
from fastgpt2.kernels.jit import attention_check
from tests.kernels import budget
from tests.kernels.budget import DEVICE
from tests.kernels.graphs import assert_compiles_whole, assert_graph_replays

# (B, T, H, D): one of each kind here, all of them on a GPU
SHAPES = budget.grid(
    [
        (2, 1, 2, 64),
        (1, 65, 2, 64),
        (1, 63, 3, 32),
        (2, 33, 1, 80),
        (1, 40, 1, 128),
        (1, 35, 2, 12),
    ],
    [(2, T, 3, D) for T in budget.LENGTHS for D in budget.HEAD_SIZES],
)
SEED = 2**40 + 7
KERNELS = ("attention_fwd", "attention_bwd_dq", "attention_bwd_dkv")


def _qkv(B: int, T: int, H: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, T, 3 * H * D, device=DEVICE).to(dtype)


def _op(n_head: int, **options: Any) -> Callable[[str, Tensor], Tensor]:
    def op(impl: str, qkv: Tensor) -> Tensor:
        return attention(qkv, n_head=n_head, impl=impl, **options)

    return op


def _segments(B: int, T: int) -> Tensor:
    """Documents one after the other, and a last one that goes on with the first one's number."""
    ids = torch.arange(T, device=DEVICE) * 3 // max(T, 1)
    return torch.where(ids == 2, 0, ids).expand(B, T)


def _key_range(T: int) -> Tensor:
    """Padding left and right in the first row, everything hidden in the second."""
    return torch.tensor([[T // 4, T - 3], [T // 2, T // 2]], device=DEVICE)


@pytest.mark.parametrize("dtype", budget.dtype_grid(), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_budget(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    budget.check_op(_op(shape[2]), {"qkv": _qkv(*shape, dtype)})


OPTIONS: dict[str, dict[str, Any]] = {
    "segments": {"segment_ids": True},
    "range": {"key_range": True},
    "dropout": {"dropout_p": 0.3, "seed": SEED},
    "scale": {"scale": 0.7},
    "all": {"segment_ids": True, "key_range": True, "dropout_p": 0.2, "seed": SEED, "scale": 0.3},
}


def _options(name: str, B: int, T: int) -> dict[str, Any]:
    options = dict(OPTIONS[name])
    if "segment_ids" in options:
        options["segment_ids"] = _segments(B, T)
    if "key_range" in options:
        options["key_range"] = _key_range(T)
    return options


@pytest.mark.parametrize("T", budget.grid([49], [1, 1000, 1024]))
@pytest.mark.parametrize("dtype", budget.dtype_grid(), ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_within_budget(name: str, dtype: torch.dtype, T: int) -> None:
    op = _op(2, **_options(name, 2, T))
    # eager computes with a mask in fp32, but rounds its probabilities without one
    budget.check_op(op, {"qkv": _qkv(2, T, 2, 32, dtype)}, roundings=4.0)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("name", [None, *OPTIONS])
def test_other_implementations_are_within_budget(impl: str, name: str | None) -> None:
    op = _op(2, **(_options(name, 2, 19) if name else {}))
    # in fp32 each is the other's measure
    eager = "reference" if impl == "torch" else "torch"
    budget.check_op(op, {"qkv": _qkv(2, 19, 2, 8)}, impl=impl, eager=eager, roundings=4.0)


def test_reference_matches_its_formula_in_fp64() -> None:
    q, k, v = (torch.randn(1, 1, 9, 16, device=DEVICE).double() for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    qkv = torch.cat([q, k, v], -1)[0]
    torch.testing.assert_close(_op(1)("reference", qkv), expected[0])


def test_integers_of_any_kind_as_masks() -> None:
    qkv, ids = _qkv(2, 21, 1, 16), _segments(2, 21)
    outs = [
        _op(1, segment_ids=ids.to(a), key_range=_key_range(21).to(b))("triton", qkv)
        for a, b in (
            (torch.int64, torch.int64),
            (torch.int32, torch.int64),
            (torch.int64, torch.int32),
        )
    ]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    # ids far apart that are equal in their lower 32 bits
    far = _op(1, segment_ids=ids << 32, key_range=_key_range(21))("triton", qkv)
    assert torch.equal(outs[0], far)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_blind_queries_give_zeros(impl: str) -> None:
    qkv = _qkv(2, 24, 2, 16).requires_grad_()
    key_range = torch.tensor([[5, 9], [24, 24]], device=DEVICE)
    out = _op(2, key_range=key_range)(impl, qkv)
    assert not out[0, :5].any() and not out[1].any() and out[0, 5:].any(-1).all()
    (dqkv,) = torch.autograd.grad(out, qkv, torch.randn_like(out))
    assert not dqkv[1].any() and not dqkv[0, :5, :32].any() and dqkv.isfinite().all()
    # neither keys nor values outside of the range have a gradient
    assert not dqkv[0, :5, 32:].any() and not dqkv[0, 9:, 32:].any()


def test_key_range_beyond_the_row_is_the_whole_row() -> None:
    qkv = _qkv(1, 20, 1, 16)
    key_range = torch.tensor([[-4, 99]], device=DEVICE)
    torch.testing.assert_close(_op(1, key_range=key_range)("triton", qkv), _op(1)("triton", qkv))


def test_large_scores_do_not_overflow() -> None:
    # exp of a thousand is beyond fp32; rows get their maximum in different tiles
    qkv = _qkv(1, 50, 1, 32) * 30
    budget.check_op(_op(1), {"qkv": qkv})


def test_very_negative_scores_are_not_taken_for_hidden_ones() -> None:
    q = torch.full((1, 40, 16), 1e6, device=DEVICE)
    qkv = torch.cat([q, -q * 1e6, torch.randn_like(q)], -1)
    out = _op(1)("triton", qkv)
    # all scores are the same, -4e18: the mean of the values seen so far
    steps = torch.arange(1, 41, device=DEVICE)[:, None]
    torch.testing.assert_close(out, qkv[..., 32:].cumsum(1) / steps, atol=1e-5, rtol=1e-5)


def test_dropout_mask_is_philox_bit_for_bit() -> None:
    # zero scores and one-hot values: element (t, s) of the output is the probability itself
    B, T, H, p = 2, 37, 2, 0.4
    qkv = torch.zeros(B, T, 3, H, T, device=DEVICE)
    qkv[:, :, 2] = torch.eye(T, device=DEVICE)[:, None]
    keep = philox.keep_mask(torch.tensor(SEED, device=DEVICE), (B, H, T, T), p)
    seen = keep & torch.ones_like(keep).tril()
    for impl in ("triton", "torch", "reference"):
        out = _op(H, dropout_p=p, seed=SEED)(impl, qkv.view(B, T, -1))
        probabilities = out.view(B, T, H, T).transpose(1, 2)
        assert torch.equal(probabilities != 0, seen)
    steps = torch.arange(1, T + 1, device=DEVICE)[:, None]
    torch.testing.assert_close(probabilities, seen / steps / (1 - p))


def test_seed_none_draws_a_fresh_mask() -> None:
    qkv = torch.ones(1, 64, 3 * 16, device=DEVICE)
    outs = [_op(1, dropout_p=0.5)("triton", qkv) for _ in range(2)]
    assert not torch.equal(*outs)
    assert 0.8 < float(outs[0].mean()) < 1.2


def _tiles(kernel: str) -> list[tuple[str, tuning.Config]]:
    shape_class = {"bytes": 2, "D": 64, "dropout": 0, "masked": 0}
    return [(kernel, config) for config in tuning.candidates(kernel, **shape_class)]


@pytest.mark.parametrize(
    ("kernel", "config"),
    [tile for kernel in KERNELS for tile in _tiles(kernel)],
    ids=lambda v: getattr(v, "label", v),
)
@pytest.mark.parametrize("dtype", budget.grid([torch.float16], [torch.bfloat16]), ids=str)
def test_every_config_is_exact_on_integers(
    kernel: str, config: tuning.Config, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(attention_check, "LENGTHS", (72,))
    with tuning.overriding(kernel, config):
        assert attention_check.passes(DEVICE, attention_check.Kind(dtype, 64, 2, None, None, False))


@pytest.mark.parametrize("blocks", [(16, 64), (64, 16)], ids=str)
def test_result_does_not_depend_on_tiles(blocks: tuple[int, int]) -> None:
    op = _op(2, **_options("all", 2, 45))
    qkv = _qkv(2, 45, 2, 16).requires_grad_()
    results = []
    for override in (False, True):
        config = tuning.config(4, 1, BLOCK_M=blocks[0], BLOCK_N=blocks[1])
        for kernel in KERNELS if override else ():
            tuning._overrides[kernel] = config
        try:
            out = op("triton", qkv)
            results.append((out, *torch.autograd.grad(out, qkv, out)))
        finally:
            tuning._overrides.clear()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["slice", "columns", "expanded", "transposed"])
def test_strided_inputs_and_gradients(layout: str) -> None:
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "slice": lambda x: torch.cat([x, x + 1], -1)[..., : x.shape[-1]],
        "columns": lambda x: torch.stack([x, x + 1], -1).flatten(-2)[..., ::2],
        "expanded": lambda x: x[:1].expand_as(x),
        "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    }
    lay_out = layouts[layout]
    qkv, dout = _qkv(2, 19, 2, 16), torch.randn(2, 19, 32, device=DEVICE)
    results = []
    for change in (lambda x: lay_out(x).contiguous(), lay_out):
        leaf = change(qkv).detach().requires_grad_()
        out = _op(2)("triton", leaf)
        results.append((out, *torch.autograd.grad(out, leaf, change(dout))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_scalar_loss() -> None:
    qkv = _qkv(1, 18, 1, 16).requires_grad_()
    torch.autograd.backward(_op(1)("triton", qkv).sum())
    (expected,) = torch.autograd.grad(_op(1)("reference", qkv).sum(), qkv)
    assert qkv.grad is not None
    torch.testing.assert_close(qkv.grad, expected)


@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0)])
def test_nothing_to_do(B: int, T: int) -> None:
    qkv = _qkv(B, T, 2, 16).requires_grad_()
    out = _op(2)("triton", qkv)
    assert out.shape == (B, T, 32)
    assert torch.autograd.grad(out, qkv, out)[0].shape == qkv.shape


def test_lse_is_what_backward_needs() -> None:
    qkv = _qkv(1, 20, 2, 16)
    _, lse = _attention_fwd(qkv, None, None, None, 2, 0.0, 0.25)
    q, k, _ = qkv.view(1, 20, 3, 2, 16).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT * 0.25).masked_fill(~torch.ones(20, 20, device=DEVICE).bool().tril(), -1e30)
    expected = scores.logsumexp(-1) / torch.log(torch.tensor(2.0))
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected)


@budget.rehearsed
@pytest.mark.parametrize("name", [None, "all"])
def test_same_bits_a_thousand_times(name: str | None, full: bool) -> None:
    B, T, H, D = (2, 1024, 12, 64) if full else (2, 39, 2, 16)
    op = _op(H, **(_options(name, B, T) if name else {}))
    inputs = {"qkv": _qkv(B, T, H, D, budget.HALF)}
    budget.assert_repeatable(op, inputs, times=1000 if full else 2)


@budget.rehearsed
def test_offsets_beyond_32_bits(full: bool) -> None:
    # the second row of the batch begins more than 2^31 elements after the first
    T, C, jump = (128, 128, 2**31) if full else (20, 32, 2**12)
    buffer = torch.empty(jump + 3 * T * C, dtype=torch.float16, device=DEVICE)
    qkv = buffer.as_strided((2, T, 3 * C), (jump, 3 * C, 1))
    qkv.normal_()
    expected = _op(2)("triton", qkv.contiguous())
    assert torch.equal(_op(2)("triton", qkv), expected)


@pytest.mark.parametrize("T", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("p", [0.0001, 0.3, 0.999])
def test_packed_bits_are_the_mask(T: int, p: float) -> None:
    """Every bit on and below the diagonal; what comes after it is never used."""
    seed = torch.tensor(SEED, device=DEVICE)
    words = _dropout_bits(seed, 2, 3, T, p)[: 6 * T * -(-T // 32)].view(2, 3, T, -1)
    keys = torch.arange(T, device=DEVICE)
    bits = words[..., keys // 32] >> (keys % 32) & 1 == 1
    assert torch.equal(bits.tril(), philox.keep_mask(seed, (2, 3, T, T), p).tril())


@budget.rehearsed
def test_dropout_offsets_beyond_32_bits(full: bool) -> None:
    # the last head's mask begins at B H T^2 = 3.2e9 elements
    B, T, H, D, p = (4, 8192, 12, 64, 0.5) if full else (2, 80, 2, 16, 0.5)
    qkv = torch.zeros(B, T, 3, H, D, dtype=torch.float16, device=DEVICE)
    # values that tell the first D keys apart
    qkv[:, :D, 2] = torch.eye(D, dtype=torch.float16, device=DEVICE)[:, None]
    out = _op(H, dropout_p=p, seed=SEED)("triton", qkv.view(B, T, -1)).view(B, T, H, D)
    queries = torch.arange(T - 64, T, device=DEVICE)
    rows = (B * H - 1) * T + queries
    assert not full or int(rows.min()) * T > 2**31
    keep = philox.keep_rows(torch.tensor(SEED, device=DEVICE), rows, T, p)[:, :D]
    assert torch.equal(out[-1, -64:, -1] != 0, keep)


def test_opcheck() -> None:
    qkv = _qkv(2, 9, 2, 8).requires_grad_()
    seed = torch.tensor(SEED, device=DEVICE)
    torch.library.opcheck(_attention_fwd, (qkv, None, None, None, 2, 0.0, 0.3))
    masks = _segments(2, 9).contiguous(), _key_range(9)
    torch.library.opcheck(_dropout_bits, (seed, 2, 2, 9, 0.2))
    bits = _dropout_bits(seed, 2, 2, 9, 0.2)
    torch.library.opcheck(_attention_fwd, (qkv, bits, *masks, 2, 0.2, 0.3))
    x = qkv.detach()
    out, lse = _attention_fwd(x, bits, *masks, 2, 0.2, 0.3)
    torch.library.opcheck(_attention_bwd, (out, x, out, lse, bits, *masks, 2, 0.2, 0.3))


@pytest.mark.parametrize("name", [None, "all"])
def test_compiles_whole_at_two_lengths(name: str | None) -> None:
    def step(qkv: Tensor, **masks: Any) -> Tensor:
        options: dict[str, Any] = {"dropout_p": 0.2, "seed": SEED} if name else {}
        return attention(qkv * 2, n_head=2, impl="triton", **masks, **options)

    batches = []
    for T in (7, 18):
        masks = {"segment_ids": _segments(2, T), "key_range": _key_range(T)} if name else {}
        batches.append({"qkv": _qkv(2, T, 2, 8), **masks})
    assert_compiles_whole(step, batches)


@budget.rehearsed
def test_captured_in_a_cuda_graph(full: bool) -> None:
    B, T, H, D = (2, 1024, 12, 64) if full else (2, 20, 2, 16)
    qkv = _qkv(B, T, H, D, budget.HALF).requires_grad_()

    def step() -> list[Tensor]:
        out = _op(H)("triton", qkv)
        return [out, *torch.autograd.grad(out, qkv, out)]

    assert_graph_replays(step, [qkv])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": 3.0}, TypeError, "qkv must be a tensor, got float"),
        ({"qkv": torch.ones(2, 6, 48).long()}, TypeError, "qkv must be floating point"),
        ({"qkv": torch.ones(6, 48)}, ValueError, r"qkv must be \(B, T, 3C\), got shape \(6, 48\)"),
        ({"n_head": 5}, ValueError, "got 48 with n_head=5"),
        ({"n_head": 0}, ValueError, "got 48 with n_head=0"),
        ({"qkv": torch.ones(2, 6, 0)}, ValueError, "got 0 with n_head=2"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"scale": 0.0}, ValueError, "scale must be positive and finite, got 0.0"),
        ({"segment_ids": torch.ones(2, 6)}, TypeError, "segment_ids must be int64 or int32"),
        ({"segment_ids": torch.ones(2, 5).int()}, ValueError, r"shape \(2, 6\) to match qkv"),
        ({"key_range": torch.ones(2, 2)}, TypeError, "key_range must be int64 or int32"),
        ({"key_range": torch.ones(2, 3).int()}, ValueError, r"shape \(2, 2\) to match qkv"),
        (
            {"key_range": torch.ones(2, 2, dtype=torch.int32, device="meta")},
            ValueError,
            "key_range must be on cpu, got meta",
        ),
        ({"impl": "flash"}, ValueError, "impl must be one of auto, triton, torch, reference"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"qkv": torch.ones(2, 6, 48), "n_head": 2}
    with pytest.raises(error, match=message):
        attention(**(arguments | change))


@pytest.mark.parametrize(
    ("qkv", "message"),
    [
        (torch.ones(1, 2, 3 * 136), "the kernels take heads up to 128, not 136"),
        (torch.ones(1, 1, 24).expand(65536, 1, 24), "the kernels take up to 65535 rows"),
        (torch.ones(1, 2, 24, dtype=torch.float64), "the kernels take fp32, fp16 and bf16"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(qkv: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        _op(1)("triton", qkv.to(DEVICE))
    assert _op(1)("auto", qkv.to(DEVICE)).shape == (*qkv.shape[:2], qkv.shape[2] // 3)
