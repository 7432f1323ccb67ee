"""The parts of a GPT-2: linear layers and LayerNorm, causal self-attention, the MLP, the block.

Linear layers and LayerNorms are PyTorch's own modules, which its tools know. A plain one is not
called: a fused kernel takes its weights. One that was hooked, wrapped, parametrized or replaced is
called (``plain.py`` tells them apart). Parameters may be kept in fp32 while activations are in bf16
or fp16: weights are converted to the dtype of the activation. Shapes: B batch, T tokens, C width,
H heads, D head size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt2.cache import LayerCache
from fastgpt2.config import GPTConfig
from fastgpt2.kernels import (
    add_branch,
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
    stream_layer_norm,
)
from fastgpt2.plain import call, is_plain, replaceable

# output of attention or MLP, (B, T, C), and its bias (C,) if that is not added yet
Branch = tuple[Tensor, Tensor | None]


def project(layer: nn.Module, x: Tensor, *, fp8: bool = False, impl: str = "auto") -> Tensor:
    """(..., C) -> (..., F): x W^T + b by a linear layer; with ``fp8`` the product is in FP8.

    ``impl`` is what quantises for FP8.
    """
    if not is_plain(layer, nn.Linear):
        return call(layer, x)
    assert isinstance(layer, nn.Linear)
    return _product(x, layer.weight, layer.bias, fp8, impl)


def project_without_bias(
    layer: nn.Module, x: Tensor, *, fp8: bool = False, impl: str = "auto"
) -> Branch:
    """(..., C) -> (..., F): x W^T, and b, which is left for a later pass over memory.

    b is None if there is no bias or ``layer`` has added it itself.
    """
    if not is_plain(layer, nn.Linear):
        return call(layer, x), None
    assert isinstance(layer, nn.Linear)
    return _product(x, layer.weight, None, fp8, impl), layer.bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, fp8: bool, impl: str) -> Tensor:
    if fp8:
        return linear_fp8(x, weight, bias, impl=impl)
    return linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def normalize(norm: nn.Module, x: Tensor, dtype: torch.dtype, *, impl: str = "auto") -> Tensor:
    """(..., C) -> (..., C): the LayerNorm ``norm`` of x, in ``dtype``."""
    if not is_plain(norm, nn.LayerNorm):
        return call(norm, x).to(dtype)
    assert isinstance(norm, nn.LayerNorm)
    return layer_norm(x, norm.weight, norm.bias, eps=norm.eps, impl=impl).to(dtype)


def _of_each_row(x: Tensor, wanted: Tensor) -> Tensor:
    """(B, T, ...) -> (B, 1, ...): token ``wanted[b]`` of row b."""
    return x[torch.arange(x.shape[0], device=x.device), wanted][:, None]


def _with_bias(branch: Branch) -> Tensor:
    out, bias = branch
    return out if bias is None else out + bias.to(out.dtype)


@replaceable
class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and the tokens before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout_p = config.attn_p
        self.impl = config.impl
        self.fp8 = config.fp8
        C = config.n_embd
        self.c_attn = nn.Linear(C, 3 * C, bias=config.bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, segment_ids: Tensor | None = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); with a cache, T = 1 once it holds a prompt.

        With ``segment_ids`` (B, T), tokens of different documents do not see each other.
        The block applies the dropout of the result, when it adds it to the residual stream.
        """
        return _with_bias(self.branch(x, cache, segment_ids))

    def branch(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        segment_ids: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Branch:
        """``forward`` without the last bias, and that bias.

        With ``wanted`` (B,), of each row's new tokens only that one attends: (B, 1, C).
        """
        fp8 = self.fp8 and self.training
        qkv = project(self.c_attn, x, fp8=fp8, impl=self.impl)
        if cache is not None and (wanted is not None or not cache.is_empty):
            out = self._decode(qkv, cache, wanted)
        else:
            if cache is not None:
                cache.fill(qkv, self.n_head)
            dropout_p = self.dropout_p if self.training else 0.0
            out = attention(
                qkv,
                n_head=self.n_head,
                dropout_p=dropout_p,
                segment_ids=segment_ids,
                impl=self.impl,
            )
        return project_without_bias(self.c_proj, out, fp8=fp8, impl=self.impl)

    def _decode(self, qkv: Tensor, cache: LayerCache, wanted: Tensor | None) -> Tensor:
        B, T, three_C = qkv.shape
        # (B, T, 3C) -> three of (B, T, H, D)
        q, k, v = qkv.view(B, T, 3, self.n_head, three_C // (3 * self.n_head)).unbind(2)
        if cache.is_empty:
            cache.fill(qkv, self.n_head)
        else:
            append_kv(cache.k, cache.v, k, v, cache.lengths, impl=self.impl)
        lengths = cache.lengths
        if wanted is not None:
            q, lengths = _of_each_row(q, wanted), lengths + wanted
        out = decode_attention(q, cache.k, cache.v, lengths, impl=self.impl)
        return out.reshape(B, -1, three_C // 3)


@replaceable
class MLP(nn.Module):
    """Two linear layers with a GELU between them, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.form = config.gelu
        self.impl = config.impl
        self.fp8 = config.fp8
        C = config.n_embd
        self.c_fc = nn.Linear(C, 4 * C, bias=config.bias)
        self.c_proj = nn.Linear(4 * C, C, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C).

        The block applies the dropout of the result, when it adds it to the residual stream.
        """
        return _with_bias(self.branch(x))

    def branch(self, x: Tensor) -> Branch:
        """``forward`` without the last bias, and that bias."""
        fc, proj, fp8 = self.c_fc, self.c_proj, self.fp8 and self.training
        form, impl = self.form, self.impl
        if not fp8 and is_plain(fc, nn.Linear) and is_plain(proj, nn.Linear):
            out = mlp(x, fc.weight, fc.bias, proj.weight, form=form, impl=impl)
            return out, proj.bias
        z, bias = project_without_bias(fc, x, fp8=fp8, impl=impl)
        if bias is None:
            hidden = gelu(z, form=form, impl=impl)
        else:
            hidden = bias_gelu(z, bias, form=form, impl=impl)
        return project_without_bias(proj, hidden, fp8=fp8, impl=impl)


@replaceable
class Block(nn.Module):
    """One pre-LayerNorm transformer block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout_p = config.resid_p
        self.impl = config.impl
        # keep nothing of the MLP for the backward pass, which recomputes it
        self.remat_mlp = False
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        dtype: torch.dtype | None = None,
        cache: LayerCache | None = None,
        segment_ids: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after the block.

        Args:
            x: (B, T, C), the residual stream before it.
            dtype: dtype that attention and MLP compute in; None means x's.
            cache: keys and values of this layer, for generation; with a cache that holds a prompt,
                T is 1.
            segment_ids: (B, T), the document of each token; they do not see each other.
            wanted: (B,), with a cache: the only token of each row that the block is computed for.
                The cache takes the keys and values of all. Not with replaced parts.

        Returns:
            (B, T, C), in x's dtype; (B, 1, C) with ``wanted``.
        """
        dtype = x.dtype if dtype is None else dtype
        x, normed = self._norm_1(x, dtype)
        if is_plain(self.attn, CausalSelfAttention):
            branch = self.attn.branch(normed, cache, segment_ids, wanted)
            if wanted is not None:
                x = _of_each_row(x, wanted)
        else:
            cached = () if cache is None else (cache,)
            documents: dict[str, Any] = {} if segment_ids is None else {"segment_ids": segment_ids}
            branch = call(self.attn, normed, *cached, **documents), None
        x, normed = self._add_and_norm_2(x, branch, dtype)
        if is_plain(self.mlp, MLP):
            if self.remat_mlp and self.training:
                branch = checkpoint(self.mlp.branch, normed, use_reentrant=False)
            else:
                branch = self.mlp.branch(normed)
        else:
            branch = call(self.mlp, normed), None
        return self._add(x, branch)

    def _norm_1(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        norm = self.ln_1
        if not is_plain(norm, nn.LayerNorm):
            return x, normalize(norm, x, dtype)
        x, normed = stream_layer_norm(x, norm.weight, norm.bias, eps=norm.eps, impl=self.impl)
        return x, normed.to(dtype)

    def _add_and_norm_2(
        self, x: Tensor, branch: Branch, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        norm, (out, bias) = self.ln_2, branch
        if not is_plain(norm, nn.LayerNorm):
            x = self._add(x, branch)
            return x, normalize(norm, x, dtype)
        return add_layer_norm(
            x,
            out,
            norm.weight,
            norm.bias,
            branch_bias=bias,
            dropout_p=self.dropout_p if self.training else 0.0,
            eps=norm.eps,
            impl=self.impl,
        )

    def _add(self, x: Tensor, branch: Branch) -> Tensor:
        dropout_p = self.dropout_p if self.training else 0.0
        return add_branch(x, *branch, dropout_p=dropout_p, impl=self.impl)
