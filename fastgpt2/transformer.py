"""A GPT-2 without its head: token and position embeddings, blocks, the final LayerNorm.

Shapes: B batch, T tokens, C width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt2.cache import KVCache
from fastgpt2.config import GPTConfig
from fastgpt2.kernels import embedding, tied_embedding
from fastgpt2.layers import Block, normalize
from fastgpt2.plain import is_plain, replaceable


def positions_in_segments(segment_ids: Tensor) -> Tensor:
    """The position of each token in its document: 0 where the segment id changes.

    Args:
        segment_ids: (B, T) integers.

    Returns:
        (B, T) int64.
    """
    places = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    begins = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0))
    return places - torch.where(begins, places, 0).cummax(1).values


class Embedded(NamedTuple):
    """The embeddings of some tokens.

    Attributes:
        x: (B, T, C), the residual stream before the first block.
        head: (V, C), the token embedding for the head that is tied to it: the gradient of the
            embedding is added in place to the one that the head computes.
    """

    x: Tensor
    head: Tensor


def _embedding(rows: int, width: int) -> nn.Embedding:
    # on the meta device PyTorch imports its compiler to draw numbers that do not exist: 3 s
    given = torch.empty(rows, width)
    return nn.Embedding(rows, width, _weight=given if given.is_meta else None)


@replaceable
class Transformer(nn.Module):
    """Everything before the head: token and position embeddings, blocks, final LayerNorm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = _embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = _embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.dropout_p = config.embd_p
        self.fp32_residual = config.fp32_residual
        self.impl = config.impl
        # keep only the input of each block for the backward pass, which recomputes the block
        self.remat_blocks = False

    def forward(
        self,
        idx: Tensor,
        dtype: torch.dtype | None = None,
        cache: KVCache | None = None,
        segment_ids: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """(B, T) token ids -> (B, T, C) in ``dtype``, what the head reads.

        Args:
            idx: (B, T), token ids.
            dtype: dtype that the blocks compute in; None means the position embedding's.
            cache: for generation; its lengths are the positions.
            segment_ids: (B, T), the document of each token; not with a cache.
            wanted: (B,), with a cache: each row's only token whose result is wanted, (B, 1, C).
        """
        dtype = self.wpe.weight.dtype if dtype is None else dtype
        past = cache is not None and not cache.is_empty
        positions = None if segment_ids is None else positions_in_segments(segment_ids)
        if cache is not None and past:
            new = torch.arange(idx.shape[1], device=idx.device)
            # padding after a row's own tokens may be beyond the last position
            positions = (cache.lengths[:, None] + new).clamp(max=self.wpe.num_embeddings - 1)
        if self.has_plain_embeddings:
            x: Tensor = self._embed(embedding, idx, dtype, positions)
            return self.run_blocks(x, dtype, cache, segment_ids, wanted)
        if positions is None:
            positions = torch.arange(idx.shape[1], device=idx.device)
        x = F.dropout(self.wte(idx) + self.wpe(positions), self._embedding_p)
        x = x.to(self._stream_dtype(dtype))
        return self.run_blocks(x, dtype, cache, segment_ids, wanted)

    def embed(self, idx: Tensor, dtype: torch.dtype, segment_ids: Tensor | None = None) -> Embedded:
        """(B, T) token ids -> the sum of their two plain embeddings, after dropout."""
        positions = None if segment_ids is None else positions_in_segments(segment_ids)
        return Embedded(*self._embed(tied_embedding, idx, dtype, positions))

    @property
    def has_plain_embeddings(self) -> bool:
        """Whether a kernel may read both embeddings' tables."""
        return is_plain(self.wte, nn.Embedding) and is_plain(self.wpe, nn.Embedding)

    @property
    def _embedding_p(self) -> float:
        return self.dropout_p if self.training else 0.0

    def _stream_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.fp32_residual else dtype

    def _embed(
        self, op: Callable[..., Any], idx: Tensor, dtype: torch.dtype, positions: Tensor | None
    ) -> Any:
        return op(
            idx,
            self.wte.weight,
            self.wpe.weight,
            positions=positions,
            dropout_p=self._embedding_p,
            dtype=self._stream_dtype(dtype),
            impl=self.impl,
        )

    def run_blocks(
        self,
        x: Tensor,
        dtype: torch.dtype,
        cache: KVCache | None = None,
        segment_ids: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C), the residual stream -> (B, T, C) in ``dtype``, after the final LayerNorm.

        With ``wanted``, (B, 1, C): the last block gives other tokens nothing but a key and a value.
        """
        # pass only what is given: hooks and replaced blocks need not know the arguments
        given: dict[str, Any] = {} if segment_ids is None else {"segment_ids": segment_ids}
        for i, block in enumerate(self.h):
            if self.remat_blocks and self.training:
                x = checkpoint(block, x, dtype, use_reentrant=False, **given)
                continue
            if wanted is not None and i == len(self.h) - 1:
                given["wanted"] = wanted
            x = block(x, dtype, None if cache is None else cache.layers[i], **given)
        return normalize(self.ln_f, x, dtype, impl=self.impl)
