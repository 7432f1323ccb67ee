"""Rung 6: several heads, first one after the other, then as slices of one projection."""

import torch
from torch import Tensor, nn

from fastgpt2.errors import UserError
from fastgpt2.ladder.self_attention import (
    CausalAttention,
    attend,
    attention_weights,
    check_context,
    future,
)


class MultiHeadAttentionWrapper(nn.Module):
    """``num_heads`` causal attentions over the same tokens, their results side by side.

    Args:
        d_in, d_out: width of the tokens before, and of one head after.
        context_length: the longest sequence.
        dropout: rate of the dropout on the attention weights.
        num_heads: H; the result is H * d_out wide.
        qkv_bias: whether the projections have biases.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout: float,
        num_heads: int,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            [
                CausalAttention(d_in, d_out, context_length, dropout, qkv_bias)
                for _ in range(num_heads)
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., T, d_in) -> (..., T, H * d_out)."""
        return torch.cat([head(x) for head in self.heads], dim=-1)


def head_size(d_out: int, num_heads: int) -> int:
    """D = d_out / num_heads; raises UserError where that is not a whole number."""
    if num_heads < 1 or d_out % num_heads:
        raise UserError(
            f"attention: d_out must be a multiple of num_heads, got {d_out}, {num_heads}"
        )
    return d_out // num_heads


class MultiHeadAttention(nn.Module):
    """All heads from one projection, reshaped; ``out_proj`` lets the heads speak to each other.

    Args:
        d_in, d_out: width of the tokens before, and of all heads together.
        context_length: the longest sequence.
        dropout: rate of the dropout on the attention weights.
        num_heads: H; the head size is D = d_out / H.
        qkv_bias: whether the three projections have biases.

    Raises:
        UserError: d_out is not a multiple of num_heads.
    """

    mask: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout: float,
        num_heads: int,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_size(d_out, num_heads)
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", future(context_length))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d_in) -> (B, T, d_out)."""
        q, k, v = (self._heads(W(x)) for W in (self.W_query, self.W_key, self.W_value))
        out = attend(q, k, v, self._hidden(x), self.dropout)
        # (B, H, T, D) -> (B, T, H, D) -> (B, T, d_out)
        result: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return result

    def weights(self, x: Tensor) -> Tensor:
        """Who attends to whom: (B, T, d_in) -> (B, H, T, T), each row adds up to 1."""
        q, k = self._heads(self.W_query(x)), self._heads(self.W_key(x))
        return attention_weights(q, k, self._hidden(x))

    def _heads(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        # (B, T, d_out) -> (B, T, H, D) -> (B, H, T, D)
        return x.view(B, T, self.num_heads, self.head_dim).transpose(1, 2)

    def _hidden(self, x: Tensor) -> Tensor:
        T = x.shape[-2]
        check_context(T, len(self.mask))
        return self.mask[:T, :T]
