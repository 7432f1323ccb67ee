"""The parts of a GPT-2 block: linear layers, LayerNorm, causal self-attention, MLP.

Parameters may be kept in fp32 while activations flow in bf16 or fp16: every layer takes its
weights in the dtype of the activation it is given. Shapes: B batch, T tokens, C width, H heads,
D head size.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastgpt2.cache import LayerCache
from fastgpt2.config import GPTConfig
from fastgpt2.kernels import (
    add_layer_norm,
    append_kv,
    attention,
    bias_gelu,
    decode_attention,
    gelu,
    layer_norm,
    linear,
    linear_fp8,
    mlp,
)


class Branch(NamedTuple):
    """What attention or MLP adds to the residual stream, before it is added.

    The addition, its dropout and the LayerNorm after it are one pass over memory
    (``kernels.add_layer_norm``), so a block hands its last branch on to whatever normalises next.
    """

    out: Tensor
    bias: Tensor | None


class Linear(nn.Linear):
    """y = x W^T + b, with W and b taken in x's dtype; in FP8 where training asks for it."""

    def __init__(self, C: int, F: int, *, bias: bool, fp8: bool = False) -> None:
        super().__init__(C, F, bias=bias)
        self.fp8 = fp8

    @property
    def in_fp8(self) -> bool:
        """Whether the next product is."""
        return self.fp8 and self.training

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + ``bias``, which may be left for a later pass."""
        if self.in_fp8:
            return linear_fp8(x, self.weight, bias)
        return linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)


class ResidualProjection(Linear):
    """A linear layer that ends a branch: its bias is added with the branch, not here."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, None)


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias, fused with the residual addition before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.dropout_p = config.resid_p
        self.impl = config.impl

    def forward(
        self, x: Tensor, branch: Branch | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Returns (x + branch, its norm in ``dtype``), both (B, T, C)."""
        if branch is None:
            return x, layer_norm(x, self.weight, self.bias, impl=self.impl).to(dtype)
        return add_layer_norm(
            x,
            branch.out,
            self.weight,
            self.bias,
            branch_bias=branch.bias,
            dropout_p=self.dropout_p if self.training else 0.0,
            impl=self.impl,
        )


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and the tokens before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout_p = config.attn_p
        self.impl = config.impl
        C, options = config.n_embd, {"bias": config.bias, "fp8": config.fp8}
        self.c_attn = Linear(C, 3 * C, **options)
        self.c_proj = ResidualProjection(C, C, **options)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Branch:
        """(B, T, C) -> the branch (B, T, C); with a cache, T = 1 once it holds a prompt."""
        qkv = self.c_attn(x)
        if cache is not None and not cache.is_empty:
            out = self._decode(qkv, cache)
        else:
            if cache is not None:
                cache.fill(qkv, self.n_head)
            dropout_p = self.dropout_p if self.training else 0.0
            out = attention(qkv, n_head=self.n_head, dropout_p=dropout_p, impl=self.impl)
        return Branch(self.c_proj(out), self.c_proj.bias)

    def _decode(self, qkv: Tensor, cache: LayerCache) -> Tensor:
        B, T, three_C = qkv.shape
        # (B, T, 3C) -> three of (B, T, H, D)
        q, k, v = qkv.view(B, T, 3, self.n_head, three_C // (3 * self.n_head)).unbind(2)
        append_kv(cache.k, cache.v, k, v, cache.lengths, impl=self.impl)
        out = decode_attention(q, cache.k, cache.v, cache.lengths, impl=self.impl)
        return out.reshape(B, T, three_C // 3)


class MLP(nn.Module):
    """Two linear layers with a tanh GELU between them, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.impl = config.impl
        C, options = config.n_embd, {"bias": config.bias, "fp8": config.fp8}
        self.c_fc = Linear(C, 4 * C, **options)
        self.c_proj = ResidualProjection(4 * C, C, **options)

    def forward(self, x: Tensor) -> Branch:
        """(B, T, C) -> the branch (B, T, C)."""
        if self.c_fc.in_fp8:
            return Branch(self.c_proj(self._hidden_fp8(x)), self.c_proj.bias)
        weights = (self.c_fc.weight, self.c_fc.bias, self.c_proj.weight)
        return Branch(mlp(x, *weights, impl=self.impl), self.c_proj.bias)

    def _hidden_fp8(self, x: Tensor) -> Tensor:
        z, bias = self.c_fc.product(x, None), self.c_fc.bias
        return gelu(z, impl=self.impl) if bias is None else bias_gelu(z, bias, impl=self.impl)


class Block(nn.Module):
    """One pre-LayerNorm transformer block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        branch: Branch | None,
        dtype: torch.dtype,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Branch]:
        """Adds the branch of the block before; returns the stream and this block's last branch."""
        x, normed = self.ln_1(x, branch, dtype)
        x, normed = self.ln_2(x, self.attn(normed, cache), dtype)
        return x, self.mlp(normed)
