"""Causal attention on our kernel, for transformers' own registry of attention implementations.

Importing this module registers it as ``attn_implementation="fastgpt2"``; ``GPT2Attention`` takes it
where ``sdpa`` is asked for, too, which it equals. Full causal sequences, padded at their ends or
not, run on ``kernels.attention``; every other request is transformers' ``sdpa``.
Shapes: B batch, T query tokens, S key tokens, H heads, D head size, C = H D.
"""

from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.gpt2 import modeling_gpt2
from transformers.utils.import_utils import is_tracing

from fastgpt2.kernels import attention

NAME = "fastgpt2"

# requests of other models that our kernel has no answer to: transformers' code serves or refuses
_FOREIGN_OPTIONS = ("position_bias", "softcap", "cache", "s_aux")


class _Config:
    """A model's config without the name of our attention."""

    _attn_implementation = NAME

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class _Asking:
    """An attention module as its own forward sees it: its config names our attention."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.config = _Config(module.config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class GPT2Attention(modeling_gpt2.GPT2Attention):
    """transformers' attention module, with our attention in the place of ``sdpa``.

    The config itself, the module's as the model's, stays as it is: programs compare the name in it
    with those they know, copy it, and assign to it.
    """

    @wraps(modeling_gpt2.GPT2Attention.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        asking = _Asking(self) if self.config._attn_implementation == "sdpa" else self
        return modeling_gpt2.GPT2Attention.forward(asking, *args, **kwargs)


class _Known(NamedTuple):
    """What was found out about a mask: of which version of it, and which layer asked last."""

    key_range: Tensor | None
    version: int
    layer: int


def _key_range(mask: Tensor) -> Tensor | None:
    """[start, end) of each row's keys, (B, 2), of a causal mask with padding at its ends.

    Args:
        mask: (B, 1, T, T) bool, true where a query sees a key.

    Returns:
        None if the mask is any other.
    """
    # the last query sees every key that is not padding
    kept = mask[:, 0, -1]
    start = kept.int().argmax(dim=1)
    end = start + kept.sum(dim=1)
    positions = torch.arange(mask.shape[-1], device=mask.device)
    in_range = (positions >= start[:, None]) & (positions < end[:, None])
    causal = positions <= positions[:, None]
    same = torch.equal(mask[:, 0], causal & in_range[:, None])
    return torch.stack([start, end], dim=1).int() if same else None


def _remembered_key_range(mask: Tensor, layer: int | None) -> Tensor | None:
    """``_key_range``, looked for once in a forward pass, which hands every layer the same mask.

    A layer that does not come after the one that asked last begins another pass, and looks again:
    a change through numpy or ``.data`` leaves no trace.
    """
    if layer is None or mask.is_inference():
        # nothing would tell that it was changed in place
        return _key_range(mask)
    known: _Known | None = vars(mask).get("_fastgpt2_key_range")
    if known is None or layer <= known.layer or known.version != mask._version:
        known = _Known(_key_range(mask), mask._version, layer)
    vars(mask)["_fastgpt2_key_range"] = known._replace(layer=layer)
    return known.key_range


def _padding(mask: Tensor, shape: tuple[int, ...], layer: int | None) -> Tensor | None:
    """The key range that the mask stands for, or None if none does or nobody can look."""
    if mask.dtype != torch.bool or mask.shape != shape or is_tracing(mask):
        return None
    return _remembered_key_range(mask, layer)


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
        attention_mask: transformers' ``sdpa_mask``, (B, 1, T, S) bool, or the caller's own; None
            is causal.
        dropout: rate of the dropout on the probabilities.
        scaling: of the scores; None is 1 / sqrt(D).
        is_causal: whether a query sees only what stands before it.

    Returns:
        (B, T, H, D), and None for the probabilities, which are never formed.
    """
    B, H, T, D = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    ours = (
        T > 1
        and key.shape == query.shape
        and causal
        and all(options.get(name) is None for name in _FOREIGN_OPTIONS)
    )
    key_range = None
    if ours and attention_mask is not None:
        key_range = _padding(attention_mask, (B, 1, T, T), getattr(module, "layer_idx", None))
        ours = key_range is not None
    if not ours:
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
AttentionMaskInterface.register(NAME, sdpa_mask)
