"""Prompts, and one decoding step, of a plain model: tokens in, the next logits out.

``GPT.hidden_states`` serves every model, with hooks, adapters and gradients; this serves the two
cases that generation spends its time in on a CPU: B prompts of T tokens, and B rows with one new
token each. It is a handful of PyTorch's operators per layer, and the meaning of the compiled step
(``compiled.py``), which reads the same weights. Both compute OpenAI's graph, as ``layers.py`` and
``transformer.py`` do.
Shapes: B rows, T tokens of a prompt, C width, H heads, D head size, S keys of the cache, n of them
in use, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt2.devices import device_kind
from fastgpt2.kernels import attention
from fastgpt2.kernels.backend import Impl, resolve
from fastgpt2.kernels.gelu import APPROXIMATIONS
from fastgpt2.kernels.linear import linear_and_add, linear_and_gelu, unchecked_linear
from fastgpt2.kernels.linear_int8 import linear_int8
from fastgpt2.kernels.modes import autocasts
from fastgpt2.layers import MLP, Block, CausalSelfAttention
from fastgpt2.model import GPT
from fastgpt2.plain import is_plain
from fastgpt2.quantize import QuantizedEmbedding, QuantizedLinear
from fastgpt2.transformer import Transformer


class Matrix(NamedTuple):
    """A linear layer, or a table of embeddings.

    Attributes:
        weight: (F, C), floating point or int8.
        scales: (F,), of int8.
        bias: (F,).
    """

    weight: Tensor
    scales: Tensor | None
    bias: Tensor | None


class Norm(NamedTuple):
    """A LayerNorm."""

    weight: Tensor
    bias: Tensor | None
    eps: float


class Layer(NamedTuple):
    """A block."""

    norm_1: Norm
    qkv: Matrix
    proj: Matrix
    norm_2: Norm
    fc: Matrix
    out: Matrix


class Weights(NamedTuple):
    """A model's weights as a step reads them, and the few settings that it needs."""

    tokens: Matrix
    positions: Tensor
    layers: list[Layer]
    norm: Norm
    head: Matrix
    n_head: int
    approximate: str
    fp32_residual: bool


class Position(NamedTuple):
    """The positions of the new tokens.

    Attributes:
        rows: (B,), the numbers 0 to B - 1.
        lengths: (B,), the position of each row's new token.
        visible: (B, n), which of the first n keys it attends to.
    """

    rows: Tensor
    lengths: Tensor
    visible: Tensor


class Options(NamedTuple):
    """What all blocks have in common: the dtype of their layers, and the form of the GELU."""

    dtype: torch.dtype
    approximate: str

    @classmethod
    def of(cls, weights: Weights) -> "Options":
        """Those of a model."""
        return cls(weights.positions.dtype, weights.approximate)


def weights_of(model: GPT) -> Weights | None:
    """The model's own tensors, for ``logits_after``, if it is plain and runs on a CPU by PyTorch.

    None for any other model.
    """
    positions = model.transformer.wpe.weight
    by_torch = resolve("generate", model.config.impl, positions) is Impl.TORCH
    here = by_torch and device_kind(positions.device).host
    return plain_weights(model) if here else None


def plain_weights(model: GPT) -> Weights | None:
    """The weights of a model that is unmodified or quantized; None for any other."""
    transformer, config = model.transformer, model.config
    positions = transformer.wpe
    tables = (nn.Embedding, QuantizedEmbedding)
    if not (
        type(model) is GPT
        and not vars(model).keys() & {"forward", "head", "hidden_states"}
        and is_plain(transformer, Transformer)
        and is_plain(positions, nn.Embedding)
        and any(is_plain(transformer.wte, kind) for kind in tables)
    ):
        return None
    dtype, V = positions.weight.dtype, config.vocab_size
    table: nn.Module = transformer.wte
    layers = [_layer(block) for block in transformer.h]
    norm, head = _norm(transformer.ln_f), _matrix(model.lm_head)
    if norm is None or head is None or autocasts(positions.weight.device):
        return None
    scales = table.scales if isinstance(table, QuantizedEmbedding) else None
    weights = Weights(
        tokens=Matrix(transformer.wte.weight.detach(), scales, None),
        positions=positions.weight.detach(),
        layers=[layer for layer in layers if layer is not None],
        norm=norm,
        # without the rows that only pad the vocabulary
        head=features_of(head, 0, V),
        n_head=config.n_head,
        approximate=APPROXIMATIONS[config.gelu],
        fp32_residual=config.fp32_residual,
    )
    floating = [p for p in model.parameters() if p.is_floating_point()]
    same = all(p.dtype == dtype and p.device == positions.weight.device for p in floating)
    return weights if same and len(weights.layers) == len(transformer.h) else None


def _layer(block: nn.Module) -> Layer | None:
    if not (is_plain(block, Block) and isinstance(block, Block)):
        return None
    attn, mlp = block.attn, block.mlp
    if not (is_plain(attn, CausalSelfAttention) and is_plain(mlp, MLP)):
        return None
    parts = (
        _norm(block.ln_1),
        _matrix(attn.c_attn),
        _matrix(attn.c_proj),
        _norm(block.ln_2),
        _matrix(mlp.c_fc),
        _matrix(mlp.c_proj),
    )
    return None if any(part is None for part in parts) else Layer(*parts)  # type: ignore[arg-type]


def _norm(norm: nn.Module) -> Norm | None:
    if not (is_plain(norm, nn.LayerNorm) and isinstance(norm, nn.LayerNorm)):
        return None
    bias = norm._parameters["bias"]
    return Norm(norm.weight.detach(), None if bias is None else bias.detach(), norm.eps)


def _matrix(layer: nn.Module) -> Matrix | None:
    scales: Tensor | None
    if isinstance(layer, nn.Linear) and is_plain(layer, nn.Linear):
        scales = None
    elif isinstance(layer, QuantizedLinear) and is_plain(layer, QuantizedLinear):
        scales = layer.scales
    else:
        return None
    bias: Tensor | None = layer.bias
    return Matrix(layer.weight.detach(), scales, None if bias is None else bias.detach())


def features_of(matrix: Matrix, first: int, stop: int | None) -> Matrix:
    """The matrix of features ``first`` to ``stop`` - 1; None means to the last."""
    scales, bias = (None if v is None else v[first:stop] for v in (matrix.scales, matrix.bias))
    return Matrix(matrix.weight[first:stop], scales, bias)


def _block(layer: Layer, x: Tensor, cache: Tensor, position: Position, options: Options) -> Tensor:
    """A block: x (B, C) -> (B, C); cache (2, B, H, S, D) takes the new keys and values."""
    B, n = position.visible.shape
    H, D = cache.shape[2], cache.shape[4]
    qkv = _linear(layer.qkv, _normalize(layer.norm_1, x, options.dtype)).view(B, 3, H, D)
    # advanced indices with a slice between them come first: (B, 2, H, D)
    cache[:, position.rows, :, position.lengths] = qkv[:, 1:]
    # (B, 1, 1, n): the same for every head
    mask = position.visible[:, None, None, :]
    out = _attend(qkv[:, 0], cache[0, :, :, :n], cache[1, :, :, :n], mask)
    return _after_attention(layer, x, out.reshape(B, H * D), options)


def _prompt_block(layer: Layer, x: Tensor, cache: Tensor, options: Options) -> Tensor:
    """A block of prompts: x (B, T, C) -> (B, T, C); cache (2, B, H, S, D) takes keys and values."""
    B, T, C = x.shape
    H = cache.shape[2]
    qkv = _linear(layer.qkv, _normalize(layer.norm_1, x, options.dtype).view(B * T, C))
    qkv = qkv.view(B, T, 3 * C)
    # three of (B, H, T, D)
    heads = qkv.view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)
    cache[:, :, :, :T] = heads[1:]
    out = attention(qkv, n_head=H, impl="torch").view(B * T, C)
    return _after_attention(layer, x.view(B * T, C), out, options).view(B, T, C)


def _last_prompt_block(
    layer: Layer, x: Tensor, cache: Tensor, last: Tensor, options: Options
) -> Tensor:
    """The same of token ``last`` (B,) of each row alone: (B, C)."""
    B, T, C = x.shape
    H, D = cache.shape[2], cache.shape[4]
    normed, rows = _normalize(layer.norm_1, x, options.dtype), torch.arange(B)
    kv = _linear(features_of(layer.qkv, C, 3 * C), normed.view(B * T, C))
    cache[:, :, :, :T] = kv.view(B, T, 2, H, D).permute(2, 0, 3, 1, 4)
    q = _linear(features_of(layer.qkv, 0, C), normed[rows, last]).view(B, H, D)
    mask = (torch.arange(T) <= last[:, None])[:, None, None, :]
    out = _attend(q, cache[0, :, :, :T], cache[1, :, :, :T], mask)
    return _after_attention(layer, x[rows, last], out.reshape(B, C), options)


def _after_attention(layer: Layer, x: Tensor, out: Tensor, options: Options) -> Tensor:
    """x (N, C), the residual stream before a block, after it; out (N, C) is of attention."""
    x = _add_linear(layer.proj, out, x)
    hidden = _linear_gelu(layer.fc, _normalize(layer.norm_2, x, options.dtype), options.approximate)
    return _add_linear(layer.out, hidden, x)


def logits_after(
    weights: Weights, tokens: Tensor, lengths: Tensor, kv: list[Tensor], seen: Tensor
) -> Tensor:
    """The logits after one more token of each row, whose keys and values go into the cache.

    Args:
        weights: the model's weights.
        tokens: (B,), each row's newest token.
        lengths: (B,), how many tokens of the row are in the cache.
        kv: keys and values of each layer, (2, B, H, S, D), written at ``lengths``.
        seen: (n,), the numbers 0 to n - 1: the keys that may be in use, n > every length.

    Returns:
        (B, V) in the weights' dtype.
    """
    options = Options.of(weights)
    x = lookup(weights.tokens, tokens) + F.embedding(lengths, weights.positions)
    x = x.float() if weights.fp32_residual else x.to(options.dtype)
    position = Position(torch.arange(tokens.shape[0]), lengths, seen <= lengths[:, None])
    for layer, cache in zip(weights.layers, kv, strict=True):
        x = _block(layer, x, cache, position, options)
    return _linear(weights.head, _normalize(weights.norm, x, options.dtype))


def logits_after_prompt(weights: Weights, idx: Tensor, last: Tensor, kv: list[Tensor]) -> Tensor:
    """The logits after the prompt of each row, whose keys and values go into an empty cache.

    Args:
        weights: the model's weights.
        idx: (B, T), token ids, those after a row's own of any value.
        last: (B,), the index of each row's last token.
        kv: keys and values of each layer, (2, B, H, S, D), S >= T.

    Returns:
        (B, V) in the weights' dtype.
    """
    options, (B, T) = Options.of(weights), idx.shape
    x = lookup(weights.tokens, idx.flatten()).view(B, T, -1) + weights.positions[:T]
    x = x.float() if weights.fp32_residual else x.to(options.dtype)
    for layer, cache in zip(weights.layers[:-1], kv[:-1], strict=True):
        x = _prompt_block(layer, x, cache, options)
    x = _last_prompt_block(weights.layers[-1], x, kv[-1], last, options)
    return _linear(weights.head, _normalize(weights.norm, x, options.dtype))


def lookup(table: Matrix, idx: Tensor) -> Tensor:
    """Rows ``idx`` (B,) of a table of embeddings, (B, C); in fp32 if the table is int8."""
    rows: Tensor = F.embedding(idx, table.weight)
    return rows if table.scales is None else rows.float() * table.scales[idx][:, None]


def _normalize(norm: Norm, x: Tensor, dtype: torch.dtype) -> Tensor:
    weight, bias = norm.weight.to(x.dtype), None if norm.bias is None else norm.bias.to(x.dtype)
    return F.layer_norm(x, weight.shape, weight, bias, norm.eps).to(dtype)


def _linear(layer: Matrix, x: Tensor) -> Tensor:
    """(B, C) -> (B, F) in x's dtype."""
    if layer.scales is None:
        return unchecked_linear(x, layer.weight, layer.bias)
    out = linear_int8(x, layer.weight, layer.scales)
    return out if layer.bias is None else out + layer.bias


def _add_linear(layer: Matrix, x: Tensor, stream: Tensor) -> Tensor:
    """(B, C) -> (B, F), added to the residual stream."""
    if layer.scales is None:
        return linear_and_add(x, layer.weight, layer.bias, stream)
    return stream + _linear(layer, x)


def _linear_gelu(layer: Matrix, x: Tensor, approximate: str) -> Tensor:
    """(B, C) -> (B, F) in x's dtype, after the GELU."""
    if layer.scales is None:
        return linear_and_gelu(x, layer.weight, layer.bias, approximate)
    return F.gelu(_linear(layer, x), approximate=approximate)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: q (B, H, D), k and v (B, H, n, D) -> (B, H, D) in q's dtype."""
    return F.scaled_dot_product_attention(q[:, :, None], k, v, mask)[:, :, 0]
