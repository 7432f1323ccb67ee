"""Causal attention on a CPU: matrix products and softmax over blocks of queries.

PyTorch's own CPU kernel multiplies tiles too small for the matrix units: in backward everywhere, in
forward on processors without AMX. Here one batched product over the heads multiplies a block of
queries with all keys that it sees, so half of the scores are never computed and a block of them
stays in cache. Backward recomputes the probabilities. Shapes: B batch, T tokens, C width, H heads,
D head size, C = H D.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import reference
from fastgpt2.kernels.backend import wants_gradient
from fastgpt2.kernels.modes import is_ordinary

# a processor whose matrix units PyTorch's own forward kernel knows how to fill
_HAS_AMX = torch.cpu._is_amx_tile_supported()
# queries per block: few enough to skip most of what is masked, enough for an efficient product
_BLOCK = 256 if _HAS_AMX else 128


def _batched(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B H, T, D), contiguous, as the batched product wants it."""
    return x.flatten(0, 1).contiguous()


def _blocks(T: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, and the keys that any query of the block sees."""
    for start in range(0, T, _BLOCK):
        end = min(start + _BLOCK, T)
        yield slice(start, end), slice(0, end)


def _probabilities(q: Tensor, k: Tensor, queries: slice, scale: float) -> Tensor:
    """softmax(scale q k^T, visible) of a block, (B H, block, keys)."""
    q = q[:, queries]
    k = k[:, : queries.stop]
    scores = q.new_empty(q.shape[0], q.shape[1], k.shape[1])
    torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=scale, out=scores)
    # only the last square of a block crosses the diagonal
    size = queries.stop - queries.start
    scores[:, :, queries] += q.new_full((size, size), float("-inf")).triu_(1)
    return torch.softmax(scores, dim=-1)


@torch.library.custom_op("fastgpt2::blocked_attention_fwd", mutates_args=())
def _blocked_attention_fwd(qkv: Tensor, n_head: int, scale: float) -> Tensor:
    heads = reference.split_heads(qkv, n_head)
    B, T, three_C = qkv.shape
    if _HAS_AMX:
        out = F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale)
        return out.transpose(1, 2).reshape(B, T, three_C // 3)
    q, k, v = (_batched(x) for x in heads)
    out = qkv.new_empty(B, T, n_head, q.shape[2])
    for queries, keys in _blocks(T):
        block = torch.bmm(_probabilities(q, k, queries, scale), v[:, keys])
        out[:, queries] = block.view(B, n_head, *block.shape[1:]).transpose(1, 2)
    return out.view(B, T, three_C // 3)


@_blocked_attention_fwd.register_fake
def _(qkv: Tensor, *_unused: Any) -> Tensor:
    B, T, three_C = qkv.shape
    return qkv.new_empty(B, T, three_C // 3)


@torch.library.custom_op("fastgpt2::blocked_attention_bwd", mutates_args=())
def _blocked_attention_bwd(dout: Tensor, qkv: Tensor, n_head: int, scale: float) -> Tensor:
    """dqkv (B, T, 3C); dk and dv are summed over the blocks in fp32."""
    q, k, v = (_batched(x) for x in reference.split_heads(qkv, n_head))
    (B, T, three_C), (rows, _, D) = qkv.shape, q.shape
    dout = _batched(dout.reshape(B, T, n_head, D).transpose(1, 2))
    dqkv = qkv.new_empty(B, T, 3, n_head, D)
    # three of (B, H, T, D)
    dq, dk, dv = dqkv.permute(2, 0, 3, 1, 4)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    dk_sum, dv_sum = (q.new_zeros((rows, T, D), dtype=wide) for _ in range(2))
    for queries, keys in _blocks(T):
        p = _probabilities(q, k, queries, scale)
        dp = torch.bmm(dout[:, queries], v[:, keys].transpose(1, 2))
        dv_sum[:, keys] += torch.bmm(p.mT, dout[:, queries])
        # p (dp - sum(p dp)), the row's sum in fp32
        dscores = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dk_sum[:, keys] += torch.bmm(dscores.mT, q[:, queries])
        block = torch.bmm(dscores, k[:, keys]).mul_(scale)
        dq[:, :, queries] = block.view(B, n_head, *block.shape[1:])
    dk.copy_(dk_sum.mul_(scale).view(dk.shape))
    dv.copy_(dv_sum.view(dv.shape))
    return dqkv.view(B, T, three_C)


@_blocked_attention_bwd.register_fake
def _(dout: Tensor, qkv: Tensor, *_unused: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, *ctx.options = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    (qkv,) = ctx.saved_tensors
    return _blocked_attention_bwd(dout, qkv, *ctx.options), None, None


_blocked_attention_fwd.register_autograd(_backward, setup_context=_save)


def takes_prefixes(qkv: Tensor) -> bool:
    """Whether ``attention_by_prefixes`` is the fastest form for these queries, (B, T, 3C).

    PyTorch's kernel takes queries by 64 at these lengths, and computes all scores of such a block
    with 512 keys, masked or not. Where it takes them by 256, it is as fast alone.
    """
    return (
        qkv.device.type == "cpu"
        and qkv.dtype == torch.float32
        and not _HAS_AMX
        and 192 <= qkv.shape[1] < 768
        and not torch.compiler.is_compiling()
        and is_ordinary(qkv)
        and not wants_gradient(qkv)
    )


def attention_by_prefixes(qkv: Tensor, n_head: int, scale: float) -> Tensor:
    """Causal attention over packed (B, T, 3C) to (B, T, C) by PyTorch's kernel, without a gradient.

    It gets a block of queries at a time, and the keys that some of them see.
    """
    q, k, v = reference.split_heads(qkv, n_head)
    B, T, three_C = qkv.shape
    out = qkv.new_empty(B, T, n_head, q.shape[3])
    for queries, keys in _blocks(T):
        shape = queries.stop - queries.start, keys.stop
        mask = qkv.new_full(shape, float("-inf")).triu_(queries.start + 1)
        block = F.scaled_dot_product_attention(
            q[:, :, queries], k[:, :, keys], v[:, :, keys], mask, scale=scale
        )
        out[:, queries] = block.transpose(1, 2)
    return out.view(B, T, three_C // 3)


def blocked_attention(qkv: Tensor, n_head: int, scale: float) -> Tensor:
    """Causal attention over packed (B, T, 3C), as in ``attention``, to (B, T, C).

    Scores and probabilities are rounded to qkv's dtype, sums are fp32 (fp64 for fp64). On a
    processor with AMX the forward pass is PyTorch's kernel, which does not round the scores.
    """
    out: Tensor = _blocked_attention_fwd(qkv, n_head, scale)
    return out
