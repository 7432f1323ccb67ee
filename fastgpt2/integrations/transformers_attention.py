"""Causal attention on our kernel, for transformers' own registry of attention implementations.

Importing this module registers it as ``attn_implementation="fastgpt2"``; ``GPT2Attention`` takes it
where ``sdpa`` is asked for, too, which it equals. Full causal sequences, padded at their ends or
not, run on ``kernels.attention``; every other request is transformers' ``sdpa``.
Shapes: B batch, T query tokens, S key tokens, H heads, D head size, C = H D.
"""

from typing import Any

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
    """A model's config as its attention modules read it: they find ours where it names ``sdpa``."""

    def __init__(self, config: Any) -> None:
        self._config = config

    @property
    def _attn_implementation(self) -> Any:
        name = self._config._attn_implementation
        return NAME if name == "sdpa" else name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class GPT2Attention(modeling_gpt2.GPT2Attention):
    """transformers' attention module, with our attention in the place of ``sdpa``.

    The config itself stays as it is: programs compare the name in it with those they know.
    """

    @property
    def config(self) -> Any:
        """What chooses the attention implementation."""
        return _Config(self.__dict__["config"])

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"] = value


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

    The first layer always looks: a change through numpy or ``.data`` leaves no trace.
    """
    if mask.is_inference():
        # nothing would tell that it was changed in place
        return _key_range(mask)
    known = vars(mask).get("_fastgpt2_key_range")
    if not layer or known is None or known[0] != mask._version:
        known = vars(mask)["_fastgpt2_key_range"] = (mask._version, _key_range(mask))
    key_range: Tensor | None = known[1]
    return key_range


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
