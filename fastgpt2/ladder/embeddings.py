"""Rung 4: ids become vectors, and the vectors know where they stand."""

import torch
from torch import Tensor, nn

from fastgpt2.errors import UserError


class TokenEmbedder(nn.Module):
    """x[t] = tok_emb[idx[t]] + pos_emb[t]: a learned vector for the token and one for its place.

    Args:
        vocab_size: V.
        emb_dim: C, width of the vectors.
        context_length: the longest sequence there are positions for.
    """

    def __init__(self, vocab_size: int, emb_dim: int, context_length: int) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(vocab_size, emb_dim)
        self.pos_emb = nn.Embedding(context_length, emb_dim)

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, C)."""
        return add_positions(self.tok_emb(idx), self.pos_emb)


def add_positions(x: Tensor, pos_emb: nn.Embedding) -> Tensor:
    """(B, T, C) -> (B, T, C), the vector of position t added to each token t.

    Raises:
        UserError: there are more tokens than positions.
    """
    T = x.shape[-2]
    if T > pos_emb.num_embeddings:
        raise UserError(f"{T} tokens, but context_length is {pos_emb.num_embeddings}")
    positions: Tensor = pos_emb(torch.arange(T, device=x.device))
    return x + positions
