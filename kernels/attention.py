"""Causal self-attention over packed queries, keys and values."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks, philox, reference, tuning
from fastgpt2.kernels.backend import INTERPRETED, Impl, resolve
from fastgpt2.kernels.blocked_attention import (
    attention_by_prefixes,
    blocked_attention,
    takes_prefixes,
)
from fastgpt2.kernels.dropout_bits import bits_size
from fastgpt2.kernels.modes import recorded

# the widest head that the kernels' tiles are made for, the most rows that a grid holds, and how
# far apart tokens may lie for offsets within a tile to fit in 32 bits
_MAX_HEAD_SIZE, _MAX_ROWS, _MAX_STRIDE = 128, 65535, 2**23
# checked together: a GPU that cannot run one of these kernels runs none of them
_KERNELS = ("attention_fwd", "attention_bwd_dq", "attention_bwd_dkv")


@torch.library.custom_op("fastgpt2::attention_dropout_bits", mutates_args=())
def _dropout_bits(seed: Tensor, B: int, H: int, T: int, dropout_p: float) -> Tensor:
    """The dropout mask of the probabilities, one bit each, for both forward and backward."""
    from fastgpt2.kernels.jit import attention_dropout as jit

    return jit.launch_bits(seed, B, H, T, dropout_p)


@_dropout_bits.register_fake
def _(seed: Tensor, B: int, H: int, T: int, dropout_p: float) -> Tensor:
    return seed.new_empty(bits_size(B, H, T), dtype=torch.int32)


@torch.library.custom_op("fastgpt2::attention_fwd", mutates_args=())
def _attention_fwd(
    qkv: Tensor,
    bits: Tensor | None,
    segment_ids: Tensor | None,
    key_range: Tensor | None,
    n_head: int,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse): lse (B, H, T) is log2 of each row's sum of 2^(score log2 e), in fp32."""
    from fastgpt2.kernels.jit import attention as jit

    return jit.launch_fwd(qkv, bits, segment_ids, key_range, n_head, dropout_p, scale)


@_attention_fwd.register_fake
def _(
    qkv: Tensor,
    bits: Tensor | None,
    segment_ids: Tensor | None,
    key_range: Tensor | None,
    n_head: int,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    B, T, three_C = qkv.shape
    return qkv.new_empty(B, T, three_C // 3), qkv.new_empty(B, n_head, T, dtype=torch.float32)


@torch.library.custom_op("fastgpt2::attention_bwd", mutates_args=())
def _attention_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    bits: Tensor | None,
    segment_ids: Tensor | None,
    key_range: Tensor | None,
    n_head: int,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """dqkv (B, T, 3C)."""
    from fastgpt2.kernels.jit import attention_bwd as jit

    masks = (bits, segment_ids, key_range)
    return jit.launch_bwd(dout, qkv, out, lse, *masks, n_head, dropout_p, scale)


@_attention_bwd.register_fake
def _(dout: Tensor, qkv: Tensor, *_unused: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bits, segment_ids, key_range, *ctx.options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, bits, segment_ids, key_range)


def _backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    dqkv = _attention_bwd(dout, *ctx.saved_tensors, *ctx.options)
    return dqkv, None, None, None, None, None, None


_attention_fwd.register_autograd(_backward, setup_context=_save)


def _miscompiled(index: int, *kind: Any) -> str | None:
    from fastgpt2.kernels.jit import attention_check

    return attention_check.obstacle(index, attention_check.Kind(*kind))


def _refused(index: int, D: int, bytes: int, dropout: bool, masked: bool) -> str | None:
    arch = tuning.arch_of(torch.device("cuda", index))
    shape_class = {"D": D, "bytes": bytes, "dropout": int(dropout), "masked": int(masked)}
    reasons = (tuning.refusal(kernel, arch, **shape_class) for kernel in _KERNELS)
    return next((reason for reason in reasons if reason is not None), None)


# constants to torch.compile, which must neither trace a self-check nor query the GPU
_miscompiled._dynamo_marked_constant = True  # type: ignore[attr-defined]
_refused._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _obstacle(
    qkv: Tensor,
    n_head: int,
    segment_ids: Tensor | None,
    key_range: Tensor | None,
    dropout: bool,
) -> str | None:
    """Why the kernels cannot run on this tensor, or None if they can."""
    D = qkv.shape[2] // (3 * n_head)
    if D > _MAX_HEAD_SIZE:
        return f"the kernels take heads up to {_MAX_HEAD_SIZE}, not {D}"
    if qkv.shape[0] > _MAX_ROWS:
        return f"the kernels take up to {_MAX_ROWS} rows, not {qkv.shape[0]}"
    if INTERPRETED:
        return None
    index = qkv.device.index or 0
    masked = segment_ids is not None or key_range is not None
    refusal = _refused(index, D, qkv.element_size(), dropout, masked)
    if refusal is not None:
        return refusal
    masks = (None if ids is None else ids.dtype for ids in (segment_ids, key_range))
    return _miscompiled(index, qkv.dtype, D, n_head, *masks, dropout)


def attention(
    qkv: Tensor,
    *,
    n_head: int,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    segment_ids: Tensor | None = None,
    key_range: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Causal multi-head attention: out_h = dropout(softmax(scale q_h k_h^T, visible)) v_h.

    Query t sees key s if s <= t, if both are of the same segment, and if s lies in its row's key
    range; a query that sees nothing gives zeros. Softmax in fp32, out in qkv's dtype. Vaswani et
    al., "Attention is all you need", 2017; tiled as in Dao, "FlashAttention-2", 2023.

    Args:
        qkv: (B, T, 3C), the projection's output: q, k, v side by side, heads side by side in each.
        n_head: H; the head size is D = C / H.
        dropout_p: rate of the dropout on the probabilities.
        seed: key of the Philox dropout mask, the same on every implementation; None draws one
            (``torch`` then takes PyTorch's own dropout).
        segment_ids: (B, T) integers; tokens of different documents do not see each other.
        key_range: (B, 2) integers, the keys [start, end) of each row that are not padding.
        scale: positive factor of the scores; None means 1 / sqrt(D).
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        (B, T, C), heads side by side.

    Raises:
        ValueError: a shape or device does not match; dropout_p outside [0, 1); scale not positive.
        TypeError: qkv is not floating point; segment_ids, key_range, n_head or seed not integer.
    """
    op = "attention"
    checks.check_floating(op, "qkv", qkv)
    checks.check_dim(op, "qkv", qkv, 3, "(B, T, 3C)")
    B, T, three_C = qkv.shape
    checks.check_int(op, "n_head", n_head)
    if n_head < 1 or three_C == 0 or three_C % (3 * n_head):
        raise ValueError(
            f"{op}: qkv's last dimension must be 3 * n_head * head size, got {three_C} "
            f"with n_head={n_head}"
        )
    checks.check_dropout(op, dropout_p, seed)
    if segment_ids is not None:
        checks.check_integer(op, "segment_ids", segment_ids)
        checks.check_shape(op, "segment_ids", segment_ids, (B, T), f"qkv {tuple(qkv.shape)}")
        checks.check_same_device(op, "segment_ids", segment_ids, qkv.device)
    if key_range is not None:
        checks.check_integer(op, "key_range", key_range)
        checks.check_shape(op, "key_range", key_range, (B, 2), f"qkv {tuple(qkv.shape)}")
        checks.check_same_device(op, "key_range", key_range, qkv.device)
    if scale is None:
        scale = 1.0 / math.sqrt(three_C // (3 * n_head))
    checks.check_positive(op, "scale", scale)

    def obstacle() -> str | None:
        return _obstacle(qkv, n_head, segment_ids, key_range, dropout_p > 0)

    match resolve(op, impl, qkv, obstacle):
        case Impl.REFERENCE:
            key = philox.as_seed(seed, qkv.device) if dropout_p > 0 else None
            return reference.attention(qkv, n_head, dropout_p, key, segment_ids, key_range, scale)
        case Impl.TORCH:
            return _torch_attention(qkv, n_head, dropout_p, seed, segment_ids, key_range, scale)
    if qkv.stride(2) != 1 or qkv.stride(1) > _MAX_STRIDE:
        qkv = qkv.contiguous()
    bits = None
    if dropout_p > 0:
        bits = _dropout_bits(philox.as_seed(seed, qkv.device), B, n_head, T, dropout_p)
    options = (n_head, dropout_p, scale)
    out: Tensor = _attention_fwd(qkv, bits, segment_ids, key_range, *options)[0]
    return out


def _torch_attention(
    qkv: Tensor,
    n_head: int,
    dropout_p: float,
    seed: int | Tensor | None,
    segment_ids: Tensor | None,
    key_range: Tensor | None,
    scale: float,
) -> Tensor:
    B, T, three_C = qkv.shape
    if dropout_p > 0 and seed is not None:
        # PyTorch's kernels draw their own masks: an explicit seed needs the reference formula
        key = philox.as_seed(seed, qkv.device)
        return reference.attention(qkv, n_head, dropout_p, key, segment_ids, key_range, scale)
    unmasked = segment_ids is None and key_range is None
    blocks = unmasked and dropout_p == 0 and not recorded()
    if blocks and qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16:
        # in bf16 the library's products are much faster than its attention; in fp32 they are not
        return blocked_attention(qkv, n_head, scale)
    if blocks and takes_prefixes(qkv):
        return attention_by_prefixes(qkv, n_head, scale)
    q, k, v = reference.split_heads(qkv, n_head)
    if unmasked:
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, is_causal=True, scale=scale
        )
    else:
        visible = reference.visible_keys(T, segment_ids, key_range, qkv.device)
        # a row of only -inf gives NaN in some of PyTorch's kernels: let it see itself, then zero it
        blind = ~visible.any(dim=-1, keepdim=True)
        mask = visible | (blind & torch.eye(T, dtype=torch.bool, device=qkv.device))
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout_p, scale=scale)
        out = out.masked_fill(blind, 0.0)
    return out.transpose(1, 2).reshape(B, T, three_C // 3)
