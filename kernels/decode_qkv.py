"""Queries of new tokens, whose keys and values go into the cache: one launch in decoding."""

from typing import Any

import torch
from torch import Tensor

from fastgpt2.kernels import checks, reference
from fastgpt2.kernels.backend import Impl, resolve
from fastgpt2.kernels.decode_linear import NO_GELU, adjacent, by_library, check_layer, obstacle
from fastgpt2.kernels.reference import Beside


@torch.library.custom_op("fastgpt2::decode_qkv", mutates_args=("k_cache", "v_cache"))
def _decode_qkv(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    eps: float,
) -> Tensor:
    """q (B, H, D)."""
    from fastgpt2.kernels.jit import decode_qkv as jit

    beside = Beside(scales, bias, norm_weight, norm_bias, None)
    return jit.launch(x, weight, beside, k_cache, v_cache, lengths, eps)


@_decode_qkv.register_fake
def _(*arguments: Any) -> Tensor:
    k_cache: Tensor = arguments[6]
    B, H, _, D = k_cache.shape
    return k_cache.new_empty(B, H, D)


def _check(
    x: Tensor, weight: Tensor, beside: Beside, k_cache: Tensor, v_cache: Tensor, lengths: Tensor
) -> None:
    op = "decode_qkv"
    check_layer(op, x, weight, beside)
    checks.check_floating(op, "k_cache", k_cache)
    checks.check_dim(op, "k_cache", k_cache, 4, "(B, H, S, D)")
    B, H, S, D = k_cache.shape
    checks.check_shape(op, "k_cache", k_cache, (x.shape[0], H, S, D), f"x {tuple(x.shape)}")
    checks.check_floating(op, "v_cache", v_cache)
    checks.check_shape(op, "v_cache", v_cache, (B, H, S, D), f"k_cache {(B, H, S, D)}")
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(f"{op}: v_cache must be {k_cache.dtype} like k_cache, got {v_cache.dtype}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.check_same_device(op, name, cache, x.device)
        checks.check_contiguous(op, name, cache)
    matched = f"k_cache {(B, H, S, D)}"
    checks.check_shape(op, "weight", weight, (3 * H * D, x.shape[1]), matched)
    checks.check_integer(op, "lengths", lengths)
    checks.check_shape(op, "lengths", lengths, (B,), f"x {tuple(x.shape)}")
    checks.check_same_device(op, "lengths", lengths, x.device)


@torch.no_grad()
def decode_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scales: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """q_b, k_b, v_b = scales (W norm(x_b)) + bias; k_cache[b, :, lengths[b]] = k_b, likewise v_b.

    ``decode_linear`` and ``append_kv`` in one, for one new token of each of a few rows. The Triton
    kernel computes in fp32 and rounds once, to the caches' dtype. No gradient flows. ``lengths`` is
    not changed: it counts the keys before the new ones, as in ``decode_attention``.

    Args:
        x: (B, C). Above ``MAX_ROWS`` rows, ``auto`` takes the library and ``triton`` refuses.
        weight: (3 H D, C), floating point or int8: queries, keys and values, each by heads.
        bias: (3 H D,) or None.
        k_cache: (B, H, S, D), its last dimension contiguous.
        v_cache: (B, H, S, D), its last dimension contiguous, in k_cache's dtype.
        lengths: (B,) integers, 0 <= lengths[b] <= S. A row of length S is full: it writes nothing.
        scales: (3 H D,), the scales of int8 weights; None means 1.
        norm_weight: (C,), gamma of the LayerNorm of x before the product; None means no LayerNorm.
        norm_bias: (C,), beta, or None.
        eps: epsilon of the LayerNorm, positive.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        The queries, (B, H, D), in the caches' dtype.

    Raises:
        ValueError: a shape, device, stride or eps does not fit.
        TypeError: a tensor is not floating point (weight may be int8), the caches' dtypes differ,
            or lengths are not integers.
        RuntimeError: ``triton`` was asked for and cannot run.
    """
    op = "decode_qkv"
    beside = Beside(scales, bias, norm_weight, norm_bias, None)
    _check(x, weight, beside, k_cache, v_cache, lengths)
    checks.check_positive(op, "eps", eps)
    match resolve(op, impl, x, lambda: obstacle(x)):
        case Impl.REFERENCE:
            q, *caches = reference.decode_qkv(x, weight, beside, k_cache, v_cache, lengths, eps)
            k_cache.copy_(caches[0])
            v_cache.copy_(caches[1])
            return q.to(k_cache.dtype)
        case Impl.TORCH:
            qkv = by_library(x, weight, beside, eps, NO_GELU, k_cache.dtype)
            B, H, S, D = k_cache.shape
            q, k, v = qkv.view(B, 3, H, D).unbind(1)
            rows, slots = torch.arange(B, device=x.device), lengths.clamp(max=S - 1)
            fits = (lengths < S)[:, None, None]
            for cache, new in ((k_cache, k), (v_cache, v)):
                # indices with a slice between them come first: (B, H, D)
                cache[rows, :, slots] = torch.where(fits, new, cache[rows, :, slots])
            return q
    tensors = [None if t is None else adjacent(t) for t in (x, weight, *beside[:4])]
    out: Tensor = _decode_qkv(*tensors, k_cache, v_cache, lengths.contiguous(), eps)
    return out
