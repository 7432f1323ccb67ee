"""Attention of one new query a row against its key/value cache."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks, reference
from fastgpt2.kernels.backend import Impl, resolve

# the widest head that the kernels' tiles are made for, the most rows that a grid holds
_MAX_HEAD_SIZE, _MAX_ROWS = 128, 65535


@torch.library.custom_op("fastgpt2::decode_attention", mutates_args=())
def _decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """out (B, H, D)."""
    from fastgpt2.kernels.jit import decode_attention as jit

    return jit.launch(q, k_cache, v_cache, lengths, scale)


@_decode_attention.register_fake
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


def _adjacent(x: Tensor) -> Tensor:
    """``x``, copied only if the elements of its rows are not side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _obstacle(q: Tensor) -> str | None:
    """Why the kernels cannot run on these queries, or None if they can."""
    if q.shape[2] > _MAX_HEAD_SIZE:
        return f"the kernels take heads up to {_MAX_HEAD_SIZE}, not {q.shape[2]}"
    if q.shape[0] > _MAX_ROWS:
        return f"the kernels take up to {_MAX_ROWS} rows, not {q.shape[0]}"
    return None


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """out_bh = softmax(scale q_bh K_bh^T) V_bh over the first ``lengths[b]`` keys of the cache.

    Softmax in fp32, out in q's dtype; no gradient. What the cache holds behind ``lengths[b]`` does
    not matter (``torch`` wants it finite); a row of length 0 gives zeros. The keys of long rows are
    shared among programs: Dao et al., "Flash-Decoding for long-context inference", 2023.

    Args:
        q: (B, H, D), this step's queries.
        k_cache: (B, H, S, D).
        v_cache: (B, H, S, D).
        lengths: (B,) integers, 0 <= lengths[b] <= S.
        scale: of the scores, positive; None is 1 / sqrt(D).
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        (B, H, D).

    Raises:
        ValueError: a shape or device does not match; scale not positive.
        TypeError: q is not floating point, a cache not of its dtype, or lengths not integer.
    """
    op = "decode_attention"
    checks.check_vectors(op, "q", q)
    checks.check_dim(op, "q", q, 3, "(B, H, D)")
    checks.check_dim(op, "k_cache", k_cache, 4, "(B, H, S, D)")
    B, H, D = q.shape
    expected = (B, H, k_cache.shape[2], D)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.check_shape(op, name, cache, expected, f"q {tuple(q.shape)}")
        checks.check_same_device(op, name, cache, q.device)
        if cache.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must be {q.dtype} like q, got {cache.dtype}")
    checks.check_integer(op, "lengths", lengths)
    checks.check_shape(op, "lengths", lengths, (B,), f"q {tuple(q.shape)}")
    checks.check_same_device(op, "lengths", lengths, q.device)
    if scale is None:
        scale = 1.0 / math.sqrt(D)
    checks.check_positive(op, "scale", scale)
    match resolve(op, impl, q, lambda: _obstacle(q)):
        case Impl.REFERENCE:
            return reference.decode_attention(q, k_cache, v_cache, lengths, scale)
        case Impl.TORCH:
            S = k_cache.shape[2]
            visible = (torch.arange(S, device=q.device) < lengths[:, None])[:, None, None]
            # a row without keys looks at the first one, then is zeroed
            empty = (lengths == 0)[:, None, None, None]
            mask = visible | (empty & (torch.arange(S, device=q.device) == 0))
            out = F.scaled_dot_product_attention(q[:, :, None], k_cache, v_cache, mask, scale=scale)
            return out.masked_fill(empty, 0.0)[:, :, 0]
    caches = _adjacent(k_cache), _adjacent(v_cache)
    result: Tensor = _decode_attention(_adjacent(q), *caches, lengths.contiguous(), scale)
    return result
