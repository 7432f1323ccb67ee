"""Rung 5: attention with one head, from dot products to the mask that hides the future.

Shapes: T tokens of width d_in become T tokens of width d_out; leading batch dimensions may stand
before them. Vaswani et al., "Attention is all you need", 2017.
"""

import math

import torch
from torch import Tensor, nn

from fastgpt2.errors import UserError


def simple_attention(x: Tensor) -> Tensor:
    """softmax(x x^T) x: each token becomes an average of all, weighted by its dot products.

    Nothing is learned: the inputs (..., T, C) alone say who attends to whom.
    """
    weights = torch.softmax(x @ x.transpose(-2, -1), dim=-1)
    return weights @ x


def attention_weights(q: Tensor, k: Tensor, hidden: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)), (..., T, S); where ``hidden`` is true, the weight is 0.

    Dividing by sqrt(D) keeps the variance of the scores that of the entries: without it a wide
    head's softmax would put all its weight on one key, and hardly any gradient would pass.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.softmax(scores, dim=-1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None, dropout: nn.Module | None = None
) -> Tensor:
    """dropout(softmax(q k^T / sqrt(D), hidden)) v, (..., T, D)."""
    weights = attention_weights(q, k, hidden)
    return (weights if dropout is None else dropout(weights)) @ v


def future(context_length: int) -> Tensor:
    """(T, T) bool, true where the key comes after the query: what a causal head must not see."""
    return torch.ones(context_length, context_length, dtype=torch.bool).triu(diagonal=1)


def check_context(T: int, context_length: int) -> None:
    """Raises UserError where a mask was made for fewer tokens than there are."""
    if T > context_length:
        raise UserError(f"attention: {T} tokens, but context_length is {context_length}")


class SelfAttentionV1(nn.Module):
    """Attention that learns what to ask for, what to answer to and what to say.

    W_query, W_key and W_value are bare (d_in, d_out) parameters, uniform in [0, 1).
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.W_query = nn.Parameter(torch.rand(d_in, d_out))
        self.W_key = nn.Parameter(torch.rand(d_in, d_out))
        self.W_value = nn.Parameter(torch.rand(d_in, d_out))

    def forward(self, x: Tensor) -> Tensor:
        """(..., T, d_in) -> (..., T, d_out)."""
        return attend(x @ self.W_query, x @ self.W_key, x @ self.W_value)


class SelfAttentionV2(nn.Module):
    """The same with linear layers, whose initialisation suits the width; they store W^T."""

    def __init__(self, d_in: int, d_out: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., T, d_in) -> (..., T, d_out)."""
        return attend(self.W_query(x), self.W_key(x), self.W_value(x))


# the names that the book gives them
SelfAttention_v1, SelfAttention_v2 = SelfAttentionV1, SelfAttentionV2


class CausalAttention(SelfAttentionV2):
    """The same, blind to the future, with dropout on the weights.

    Row t is what ``SelfAttentionV2`` says about the last token of the first t + 1.

    Args:
        d_in, d_out: width of the tokens before and after.
        context_length: the longest sequence, which the mask is made for.
        dropout: rate of the dropout.
        qkv_bias: whether the three projections have biases.
    """

    mask: Tensor

    def __init__(
        self, d_in: int, d_out: int, context_length: int, dropout: float, qkv_bias: bool = False
    ) -> None:
        super().__init__(d_in, d_out, qkv_bias)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", future(context_length))

    def forward(self, x: Tensor) -> Tensor:
        """(..., T, d_in) -> (..., T, d_out)."""
        T = x.shape[-2]
        check_context(T, len(self.mask))
        q, k, v = self.W_query(x), self.W_key(x), self.W_value(x)
        return attend(q, k, v, self.mask[:T, :T], self.dropout)
