"""One decoding step of a plain model on the Triton kernels: five launches per layer, nothing else.

A layer is LayerNorm and projection to queries, keys and values, which go into the cache; attention
to the cache (a sixth launch merges its shares where rows are few and long); projection and
addition; LayerNorm, first linear layer and GELU; second linear layer and addition. Of many rows the
products are the library's, and a layer has nine launches. After the head a last launch takes the
largest logit, if that is the choice.
Token ids and lengths are on the GPU, and nothing asks the host for a number, so the step can become
a CUDA graph (``graph.py``). Shapes: B rows, C width, H heads, D head size, S keys, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.generate.step import Matrix, Norm, Weights, lookup, plain_weights
from fastgpt2.kernels import (
    add_layer_norm,
    append_kv,
    decode_attention,
    decode_greedy,
    decode_head,
    decode_linear,
    decode_qkv,
    embedding,
    layer_norm,
)
from fastgpt2.kernels.backend import Impl, resolve
from fastgpt2.kernels.decode_attention import MAX_HEAD_SIZE
from fastgpt2.kernels.decode_linear import MAX_ROWS, NO_GELU
from fastgpt2.kernels.gelu import APPROXIMATIONS
from fastgpt2.model import GPT

_FORMS = {approximate: form for form, approximate in APPROXIMATIONS.items()}


def gpu_weights_of(model: GPT) -> Weights | None:
    """The model's own tensors if it is plain and runs on the Triton kernels, quantized or not.

    None for any other model.
    """
    positions = model.transformer.wpe.weight
    on_kernels = resolve("generate", model.config.impl, positions) is Impl.TRITON
    fits = model.config.head_size <= MAX_HEAD_SIZE
    return plain_weights(model) if on_kernels and fits else None


def gpu_logits_after(
    weights: Weights, tokens: Tensor, lengths: Tensor, kv: list[Tensor], impl: str
) -> Tensor:
    """The logits after one more token of each row, whose keys and values go into the cache.

    Args:
        weights: the model's weights.
        tokens: (B,), each row's newest token.
        lengths: (B,), how many tokens of the row are in the cache. For a row that is full nothing
            is written, and its logits have no meaning.
        kv: keys and values of each layer, (2, B, H, S, D), written at ``lengths``.
        impl: implementation of the ops. More than ``MAX_ROWS`` rows take the library's products.

    Returns:
        (B, V) in the weights' dtype.
    """
    if len(tokens) > MAX_ROWS:
        return _logits_of_many(weights, tokens, lengths, kv, impl)
    x = _hidden_of_few(weights, tokens, lengths, kv, impl)
    return _linear(weights.head, x, impl, weights.positions.dtype, weights.norm)


def gpu_greedy_after(
    weights: Weights,
    tokens: Tensor,
    lengths: Tensor,
    kv: list[Tensor],
    steps: Tensor,
    recent: Tensor,
    impl: str,
) -> None:
    """``gpu_logits_after``, and the largest logit's token into ``tokens``; see ``decode_greedy``.

    Args:
        weights: the model's weights.
        tokens: (B,), each row's newest token, before and after.
        lengths: (B,), how many tokens of the row are in the cache; counts the token before.
        kv: keys and values of each layer, (2, B, H, S, D), written at ``lengths``.
        steps: (B,), how many tokens ``recent`` holds of the row; below 0 for a row not in use.
        recent: (2, steps, B), the chosen tokens, and their logits.
        impl: as in ``gpu_logits_after``.
    """
    if len(tokens) > MAX_ROWS:
        logits, tops = _logits_of_many(weights, tokens, lengths, kv, impl), None
    else:
        x, head = _hidden_of_few(weights, tokens, lengths, kv, impl), weights.head
        options = {"scales": head.scales, "dtype": weights.positions.dtype, **_normed(weights.norm)}
        logits, tops = decode_head(x, head.weight, head.bias, impl=impl, **options)
    decode_greedy(logits, tops, tokens, lengths, steps, recent, impl=impl)


def _linear(
    matrix: Matrix, x: Tensor, impl: str, dtype: torch.dtype, norm: Norm, **options: Any
) -> Tensor:
    """``decode_linear`` after a LayerNorm."""
    options |= {**_normed(norm), "dtype": dtype, "impl": impl}
    return decode_linear(x, matrix.weight, matrix.bias, scales=matrix.scales, **options)


def _hidden_of_few(
    weights: Weights, tokens: Tensor, lengths: Tensor, kv: list[Tensor], impl: str
) -> Tensor:
    """(B, C), the residual stream after the last block, of up to ``MAX_ROWS`` rows."""
    dtype, form = weights.positions.dtype, _FORMS[weights.approximate]
    x = _embed(weights, tokens, lengths, impl)

    def add(x: Tensor, branch: Tensor, matrix: Matrix) -> Tensor:
        weight, scales, bias = matrix
        return decode_linear(branch, weight, bias, scales=scales, residual=x, impl=impl)

    for layer, cache in zip(weights.layers, kv, strict=True):
        weight, scales, bias = layer.qkv
        places, options = (cache[0], cache[1], lengths), _normed(layer.norm_1)
        q = decode_qkv(x, weight, bias, *places, scales=scales, impl=impl, **options)
        out = decode_attention(q[:, None], cache[0], cache[1], lengths, impl=impl)
        x = add(x, out.reshape(x.shape), layer.proj)
        x = add(x, _linear(layer.fc, x, impl, dtype, layer.norm_2, form=form), layer.out)
    return x


def _logits_of_many(
    weights: Weights, tokens: Tensor, lengths: Tensor, kv: list[Tensor], impl: str
) -> Tensor:
    """(B, V), of more rows: the products are the library's, the additions are LayerNorm's."""
    (B,), H, form = tokens.shape, weights.n_head, _FORMS[weights.approximate]
    x = _embed(weights, tokens, lengths, impl)

    def product(matrix: Matrix, x: Tensor, form: str = NO_GELU) -> Tensor:
        weight, scales, bias = matrix
        return decode_linear(x, weight, bias, scales=scales, form=form, impl=Impl.TORCH)

    def add(x: Tensor, branch: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, branch, norm.weight, norm.bias, eps=norm.eps, impl=impl)

    norm = weights.layers[0].norm_1
    normed = layer_norm(x, norm.weight, norm.bias, eps=norm.eps, impl=impl)
    normed = normed.to(weights.positions.dtype)
    # of the next block; after the last one, the head's
    norms = [*(layer.norm_1 for layer in weights.layers[1:]), weights.norm]
    for layer, cache, norm in zip(weights.layers, kv, norms, strict=True):
        q, k, v = product(layer.qkv, normed).view(B, 1, 3, H, -1).unbind(2)
        append_kv(cache[0], cache[1], k, v, lengths, impl=impl)
        out = decode_attention(q, cache[0], cache[1], lengths, impl=impl)
        x, normed = add(x, product(layer.proj, out.reshape(x.shape)), layer.norm_2)
        x, normed = add(x, product(layer.out, product(layer.fc, normed, form)), norm)
    return product(weights.head, normed)


def _normed(norm: Norm) -> dict[str, Any]:
    """The arguments of an op that begins with this LayerNorm."""
    return {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}


def _embed(weights: Weights, tokens: Tensor, lengths: Tensor, impl: str) -> Tensor:
    """(B, C), the residual stream before the first block."""
    stream = torch.float32 if weights.fp32_residual else weights.positions.dtype
    # a full row has no position left
    positions = lengths.clamp(max=weights.positions.shape[0] - 1)
    table = weights.tokens
    if table.scales is not None:
        return (lookup(table, tokens) + F.embedding(positions, weights.positions)).to(stream)
    x = embedding(
        tokens[:, None],
        table.weight,
        weights.positions,
        positions=positions[:, None],
        dtype=stream,
        impl=impl,
    )
    return x[:, 0]
