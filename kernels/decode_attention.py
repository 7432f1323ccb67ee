"""Attention of new tokens to a key/value cache, and the write of their keys and values to it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks, reference
from fastgpt2.kernels.backend import Impl, resolve
from fastgpt2.kernels.decode_linear import adjacent

# the widest head that the kernels' tiles are made for, and the most queries that a grid holds
MAX_HEAD_SIZE, _MAX_QUERIES = 128, 65535


@torch.library.custom_op("fastgpt2::append_kv", mutates_args=("k_cache", "v_cache"))
def _append_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    from fastgpt2.kernels.jit import decode_attention as jit

    jit.launch_append(k_cache, v_cache, k, v, lengths)


@_append_kv.register_fake
def _(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    return None


@torch.library.custom_op("fastgpt2::decode_attention", mutates_args=())
def _decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """out (B, T, H, D)."""
    from fastgpt2.kernels.jit import decode_attention as jit

    return jit.launch(q, k_cache, v_cache, lengths, scale)


@_decode_attention.register_fake
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


def _obstacle(x: Tensor) -> str | None:
    """Why the kernels cannot run on these new tokens (B, T, H, D), or None if they can."""
    B, T, _, D = x.shape
    if D > MAX_HEAD_SIZE:
        return f"the kernels take heads up to {MAX_HEAD_SIZE}, not {D}"
    if B * T > _MAX_QUERIES:
        return f"the kernels take up to {_MAX_QUERIES} new tokens, not {B * T}"
    return None


def _check_caches(
    op: str, name: str, x: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor
) -> None:
    """The caches and lengths match ``x`` (B, T, H, D), the argument called ``name``."""
    checks.check_vectors(op, name, x)
    checks.check_dim(op, name, x, 4, "(B, T, H, D)")
    checks.check_dim(op, "k_cache", k_cache, 4, "(B, H, S, D)")
    B, _, H, D = x.shape
    expected = (B, H, k_cache.shape[2], D)
    for cache_name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.check_shape(op, cache_name, cache, expected, f"{name} {tuple(x.shape)}")
        checks.check_same_device(op, cache_name, cache, x.device)
        if cache.dtype != x.dtype:
            raise TypeError(f"{op}: {cache_name} must be {x.dtype} like {name}, got {cache.dtype}")
    checks.check_integer(op, "lengths", lengths)
    checks.check_shape(op, "lengths", lengths, (B,), f"{name} {tuple(x.shape)}")
    checks.check_same_device(op, "lengths", lengths, x.device)


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    impl: str = "auto",
) -> None:
    """Write new keys and values into the caches, in place: k_cache[b, :, lengths[b] + t] = k[b, t].

    Nothing is rounded and no gradient flows. ``lengths`` is not changed: it counts the keys before
    these, in this call, in ``decode_attention`` and in all layers of a step.

    Args:
        k_cache: (B, H, S, D), its last dimension contiguous.
        v_cache: (B, H, S, D), its last dimension contiguous.
        k: (B, T, H, D), in the caches' dtype.
        v: (B, T, H, D), in the caches' dtype.
        lengths: (B,) integers, tokens already in each row: 0 <= lengths[b] <= S - T.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Raises:
        ValueError: a shape, device or stride does not match.
        TypeError: k is not floating point, a tensor not of its dtype, or lengths not integer.
    """
    op = "append_kv"
    _check_caches(op, "k", k, k_cache, v_cache, lengths)
    checks.check_floating(op, "v", v)
    checks.check_shape(op, "v", v, tuple(k.shape), f"k {tuple(k.shape)}")
    checks.check_same_device(op, "v", v, k.device)
    if v.dtype != k.dtype:
        raise TypeError(f"{op}: v must be {k.dtype} like k, got {v.dtype}")
    checks.check_contiguous(op, "k_cache", k_cache)
    checks.check_contiguous(op, "v_cache", v_cache)
    k, v = k.detach(), v.detach()
    match resolve(op, impl, k, lambda: _obstacle(k)):
        case Impl.REFERENCE:
            new_k, new_v = reference.append_kv(k_cache, v_cache, k, v, lengths)
            k_cache.copy_(new_k)
            v_cache.copy_(new_v)
        case Impl.TORCH:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            slots = lengths[:, None] + torch.arange(k.shape[1], device=k.device)
            k_cache[rows, :, slots] = k
            v_cache[rows, :, slots] = v
        case _:
            _append_kv(k_cache, v_cache, adjacent(k), adjacent(v), lengths.contiguous())


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """out_bth = softmax(scale q_bth K_bh^T) V_bh over the keys 0 ... lengths[b] + t of the cache.

    The T new tokens of a row are at ``lengths[b] ... lengths[b] + T - 1``, where ``append_kv``
    has written their keys and values, and each sees itself and all tokens before it. Softmax in
    fp32, out in q's dtype; no gradient. What the cache holds after a row's last new token does not
    matter (``torch`` needs it finite). The keys of long rows are divided among programs: Dao et
    al., "Flash-Decoding for long-context inference", 2023.

    Args:
        q: (B, T, H, D), the queries of this step's new tokens; T = 1 in plain decoding.
        k_cache: (B, H, S, D), the new tokens' keys included.
        v_cache: (B, H, S, D), the new tokens' values included.
        lengths: (B,) integers, tokens of each row BEFORE the new ones: 0 <= lengths[b] <= S - T.
        scale: positive factor of the scores; None means 1 / sqrt(D).
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        (B, T, H, D).

    Raises:
        ValueError: a shape or device does not match; scale not positive.
        TypeError: q is not floating point, a cache not of its dtype, or lengths not integer.
    """
    op = "decode_attention"
    _check_caches(op, "q", q, k_cache, v_cache, lengths)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    checks.check_positive(op, "scale", scale)
    match resolve(op, impl, q, lambda: _obstacle(q)):
        case Impl.REFERENCE:
            return reference.decode_attention(q, k_cache, v_cache, lengths, scale)
        case Impl.TORCH:
            mask = reference.visible_in_cache(q.shape[1], k_cache.shape[2], lengths)
            heads = q.transpose(1, 2)
            out = F.scaled_dot_product_attention(heads, k_cache, v_cache, mask, scale=scale)
            return out.transpose(1, 2)
    caches = adjacent(k_cache), adjacent(v_cache)
    result: Tensor = _decode_attention(adjacent(q), *caches, lengths.contiguous(), scale)
    return result
