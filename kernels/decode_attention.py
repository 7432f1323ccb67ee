"""Attention of one new query a row against its key/value cache."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks, reference
from fastgpt2.kernels.backend import Impl, resolve


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

    Softmax in fp32, out in q's dtype; no gradient. What the cache holds behind ``lengths[b]`` is
    never read into the result; a row of length 0 gives zeros.

    Args:
        q: (B, H, D), this step's queries.
        k_cache: (B, H, S, D).
        v_cache: (B, H, S, D).
        lengths: (B,) integers, 0 <= lengths[b] <= S.
        scale: of the scores; None is 1 / sqrt(D).
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        (B, H, D).

    Raises:
        ValueError: a shape does not match.
        TypeError: q is not floating point, or lengths not integer.
    """
    op = "decode_attention"
    checks.check_floating(op, "q", q)
    checks.check_dim(op, "q", q, 3, "(B, H, D)")
    checks.check_dim(op, "k_cache", k_cache, 4, "(B, H, S, D)")
    B, H, D = q.shape
    expected = (B, H, k_cache.shape[2], D)
    checks.check_shape(op, "k_cache", k_cache, expected, f"q {tuple(q.shape)}")
    checks.check_shape(op, "v_cache", v_cache, expected, f"q {tuple(q.shape)}")
    checks.check_integer(op, "lengths", lengths)
    checks.check_shape(op, "lengths", lengths, (B,), f"q {tuple(q.shape)}")
    if scale is None:
        scale = 1.0 / math.sqrt(D)
    match resolve(op, impl, q):
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
    raise RuntimeError("decode_attention: impl='triton' is not built yet")
