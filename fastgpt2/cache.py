"""The key/value cache of generation: every key and value is computed once."""

from copy import copy

import torch
from torch import Tensor

from fastgpt2.config import GPTConfig


class LayerCache:
    """Keys and values of one layer, (B, H, S, D), the first ``lengths[b]`` of row b valid.

    No gradient flows through a cache.
    """

    def __init__(self, kv: Tensor, lengths: Tensor) -> None:
        # (2, B, H, S, D): one write stores a token's key and value
        self.kv, self.lengths = kv, lengths
        self.k, self.v = kv.unbind()
        self.is_empty = True

    def fill(self, qkv: Tensor, n_head: int) -> None:
        """Store a prompt's keys and values from the packed projection (B, T, 3C)."""
        B, T, three_C = qkv.shape
        heads = qkv.view(B, T, 3, n_head, three_C // (3 * n_head)).permute(2, 0, 3, 1, 4)
        self.k[:, :, :T] = heads[1].detach()
        self.v[:, :, :T] = heads[2].detach()
        self.is_empty = False


class KVCache:
    """The caches of all layers, sized once: (L, 2, B, H, S, D).

    A batch of prompts of unequal length is right-padded: causality keeps the padding out of every
    real token's sight, and each row's next token overwrites it.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (config.n_layer, 2, batch_size, config.n_head, size, config.head_size)
        self.size = size
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        kv = torch.zeros(shape, device=device, dtype=dtype)
        self.layers = [LayerCache(layer, self.lengths) for layer in kv.unbind()]

    @property
    def is_empty(self) -> bool:
        """No prompt has been stored yet."""
        return self.layers[0].is_empty

    def rows(self, first: int, stop: int, *, is_empty: bool) -> "KVCache":
        """A view of adjacent rows: what is written to it is written here.

        Args:
            first: the first row.
            stop: one past the last.
            is_empty: whether none of them holds a token: then a prompt is stored next.
        """
        view = copy(self)
        view.lengths = self.lengths[first:stop]
        view.layers = [LayerCache(layer.kv[:, first:stop], view.lengths) for layer in self.layers]
        for layer in view.layers:
            layer.is_empty = is_empty
        return view

    def reorder(self, rows: Tensor) -> None:
        """Copy row ``rows[i]`` to row i."""
        count = len(rows)
        self.lengths[:count] = self.lengths[rows]
        for layer in self.layers:
            layer.kv[:, :count] = layer.kv[:, rows]

    def copy_row(self, source: int, target: int) -> None:
        """Copy row ``source`` to row ``target``."""
        self.lengths[target] = self.lengths[source]
        for layer in self.layers:
            layer.kv[:, target] = layer.kv[:, source]

    def advance(self, count: int | Tensor) -> None:
        """Count tokens as stored: a prompt's lengths (B,), or 1 after each step."""
        self.lengths += count
