"""Causal attention on our kernel, for transformers' own registry of attention implementations.

Importing this module registers it as ``attn_implementation="fastgpt2"``. Full causal sequences,
padded or not, run on ``kernels.attention``; every other request is transformers' ``sdpa``.
Shapes: B batch, T query tokens, S key tokens, H heads, D head size, C = H D.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from fastgpt2.kernels import attention

NAME = "fastgpt2"

# requests of other models that our kernel has no answer to: transformers' code serves or refuses
_FOREIGN_OPTIONS = ("position_bias", "softcap", "cache", "s_aux")


def causal_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> Tensor | None:
    """What the attention modules are handed as mask; transformers calls this once a forward pass.

    Returns:
        None for plain causal attention; a key range, (B, 1, 1, 2) int32, for causal attention with
        padding at either end; otherwise transformers' boolean mask, (B, 1, T, S).
    """
    plain = mask_function is causal_mask_function and allow_is_causal_skip
    if plain and q_length == kv_length > 1:
        if attention_mask is None:
            return None
        # under a tracer nobody can look whether the padding has holes
        if attention_mask.shape[1] == kv_length and not is_tracing(attention_mask):
            key_range, has_holes, is_full = _key_range(attention_mask)
            if is_full:
                return None
            if not has_holes:
                return key_range
    mask: Tensor | None = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **options,
    )
    return mask


def _key_range(attention_mask: Tensor) -> tuple[Tensor, bool, bool]:
    """[start, end) of each row's tokens, (B, 1, 1, 2) int32; has a row holes? is no row padded?"""
    kept = attention_mask.bool()
    start = kept.int().argmax(dim=1)
    end = start + kept.sum(dim=1)
    positions = torch.arange(kept.shape[1], device=kept.device)
    in_range = (positions >= start[:, None]) & (positions < end[:, None])
    # both answers in one wait for the device
    has_holes, is_full = torch.stack([(in_range != kept).any(), kept.all()]).tolist()
    return torch.stack([start, end], dim=1).int()[:, None, None], has_holes, is_full


def _is_key_range(mask: Tensor) -> bool:
    # no mask of transformers is int32: what reaches scaled_dot_product_attention is bool or float
    return mask.dtype == torch.int32 and mask.shape[1:] == (1, 1, 2)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """softmax(scale q k^T, visible) v, by the signature of transformers' attention functions.

    Args:
        module: the attention module; its ``is_causal`` holds where the argument is None.
        query: (B, H, T, D).
        key: (B, H, S, D).
        value: (B, H, S, D).
        attention_mask: what ``causal_mask`` made, or a 4-D mask of the caller's own.
        dropout: rate of the dropout on the probabilities.
        scaling: of the scores; None is 1 / sqrt(D).
        is_causal: whether a query sees only what stands before it.

    Returns:
        (B, T, H, D), and None for the probabilities, which are never formed.
    """
    B, H, T, D = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    key_range = None
    if attention_mask is not None and _is_key_range(attention_mask):
        key_range, attention_mask = attention_mask[:, 0, 0], None
    if (
        T == 1
        or key.shape != query.shape
        or attention_mask is not None
        or not causal
        or any(options.get(name) is not None for name in _FOREIGN_OPTIONS)
    ):
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
        return out
    merged = attention(
        _packed(query, key, value), n_head=H, dropout_p=dropout, key_range=key_range, scale=scaling
    )
    return merged.view(B, T, H, D), None


def _packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, T, 3C) from three (B, H, T, D), without a copy where they are slices of just that."""
    B, H, T, D = q.shape
    C = H * D
    base = None if torch.compiler.is_compiling() else q._base
    if base is not None and base is k._base and base is v._base:
        start, strides = base.storage_offset(), (T * 3 * C, D, 3 * C, 1)
        whole = base.is_contiguous() and base.numel() == 3 * q.numel()
        if whole and all(
            x.stride() == strides and x.storage_offset() == start + i * C
            for i, x in enumerate((q, k, v))
        ):
            return base.view(B, T, 3 * C)
    return torch.cat([x.transpose(1, 2).reshape(B, T, C) for x in (q, k, v)], dim=2)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, causal_mask)
