"""Causal attention backward: two kernels, no atomics, the same bits every time.

With P = softmax(S), dP = dO V^T, and dropout's mask and factor M (all ones without dropout),

    dV = (P M)^T dO,    dS = P (dP M - delta),    dQ = scale dS K,    dK = scale dS^T Q

where delta_i = sum_j P_ij (dP M)_ij = dO_i . O_i, so no second pass over a row is needed. P is
recomputed from q, k and the saved lse. M is a mask of zeros and ones times one factor, and that
factor is left out of dS, dV and the delta that is stored: it multiplies the sums at the end.

The first kernel owns BLOCK_M queries and walks over their keys: it sums up dq, and stores delta for
the second one, which owns BLOCK_N keys and walks over the queries that see them. (Queries beyond T
are zeros: p is 1 there, but do, dp and delta are 0.) The second one computes transposed tiles,
K Q^T and V dO^T, so that P^T and dS^T come out of one product as the left operands of the next
without being transposed, which Hopper's compilers have got wrong. Scores and dP are computed twice,
seven products instead of five: the price of having neither atomics nor an fp32 copy of dq.

Grids (H, cdiv(T, BLOCK), B). Bytes: qkv, out, dout and dqkv, 16 B T C in bf16 if each moved once;
FLOPs 7 B T^2 C, of which 5 B T^2 C count as work.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels.cases import CompileCase
from fastgpt2.kernels.jit.attention_dropout import (
    bit_rows,
    drop,
    load_keep,
    load_keep_of_keys,
    words_until_next,
)
from fastgpt2.kernels.jit.attention_parts import (
    attention_cases,
    hide,
    launch,
    load_ids,
    load_key_range,
    my_block,
)
from fastgpt2.kernels.jit.primitives import HIDDEN, LOG2E, load_tile, store_tile


@triton.jit
def _score_gradient(p, kept, dp, delta, dropout):
    """dS = P (dP M - delta); with dropout divided by its factor, as the delta given must be."""
    if dropout is None:
        return p * (dp - delta)
    else:
        return kept * dp - p * delta


@triton.jit
def _rescaled(sum, dropout):
    """``sum`` times dropout's factor, which its summands lack: applied once instead of to each."""
    if dropout is not None:
        sum *= 1.0 / (1.0 - dropout[1])
    return sum


@triton.jit
def _attention_bwd_dq_kernel(
    qkv_ptrs,
    out_ptrs,
    stats_ptrs,
    segment_ptr,
    range_ptr,
    dropout,
    strides,
    shape,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    TF32: tl.constexpr,
):
    H, T = shape
    stride_b, stride_t = strides
    C = H * D
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    MASKED: tl.constexpr = (segment_ptr is not None) or (range_ptr is not None)
    b, h, first_q = my_block(BLOCK_M, LAST_FIRST=True)
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    queries, ids_m = first_q + offs_m, load_ids(segment_ptr, b, first_q + offs_m, T)
    key_range = load_key_range(range_ptr, b, T)
    begin = key_range[0] // BLOCK_N * BLOCK_N
    q_ptr = qkv_ptrs[0] + b * stride_b + h * D
    k_ptr = q_ptr + C + begin.to(tl.int64) * stride_t
    q_ptr += first_q.to(tl.int64) * stride_t
    offset, n_rows = (b * T + first_q) * C + h * D, T - first_q
    q = load_tile(q_ptr, offs_m, stride_t, n_rows, D, EVEN)
    out = load_tile(out_ptrs[0] + offset, offs_m, C, n_rows, D, EVEN)
    do = load_tile(out_ptrs[1] + offset, offs_m, C, n_rows, D, EVEN)
    offs_stats = (b * H + h) * T + queries
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if dropout is not None:
        delta *= 1.0 - dropout[1]
        bits_ptrs = bit_rows(dropout[0], b * H + h, queries, T, EVEN)[:, None] + (begin >> 5)
    tl.store(stats_ptrs[1] + offs_stats, delta, mask=queries < T)
    lse = tl.load(stats_ptrs[0] + offs_stats, mask=queries < T, other=0.0)
    dq = tl.zeros([BLOCK_M, q.shape[1]], tl.float32)
    for first_k in range(begin, tl.minimum(first_q + BLOCK_M, key_range[1]), BLOCK_N):
        k = load_tile(k_ptr, offs_n, stride_t, T - first_k, D, EVEN)
        v = load_tile(k_ptr + C, offs_n, stride_t, T - first_k, D, EVEN)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        p = tl.exp2(s * (scale * LOG2E) - lse[:, None])
        row, col = queries[:, None], first_k + offs_n[None, :]
        ids_n, crosses = load_ids(segment_ptr, b, col, T), first_k + BLOCK_N > first_q
        p = hide(p, 0.0, row, col, crosses, ids_m[:, None], ids_n, key_range, MASKED)
        kept = p
        if dropout is not None:
            keep = load_keep(bits_ptrs, first_k, offs_n[None, :], BLOCK_N)
            bits_ptrs += words_until_next(first_k, BLOCK_N)
            kept = drop(p, keep, dropout)
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        ds = _score_gradient(p, kept, dp, delta[:, None], dropout)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        k_ptr += BLOCK_N * stride_t
    dq_ptr = qkv_ptrs[1] + (b * T + first_q) * 3 * C + h * D
    store_tile(dq_ptr, _rescaled(dq * scale, dropout), offs_m, 3 * C, n_rows, D)


@triton.jit
def _load_stats(stats_ptrs, first, row, mask):
    """The saved lse and delta of the queries ``row`` of a head, whose own begin at ``first``."""
    lse = tl.load(stats_ptrs[0] + first + row, mask=mask, other=0.0)
    delta = tl.load(stats_ptrs[1] + first + row, mask=mask, other=0.0)
    return lse, delta


@triton.jit
def _attention_bwd_dkv_kernel(
    qkv_ptrs,
    out_ptrs,
    stats_ptrs,
    segment_ptr,
    range_ptr,
    dropout,
    strides,
    shape,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    TF32: tl.constexpr,
):
    H, T = shape
    stride_b, stride_t = strides
    C = H * D
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    MASKED: tl.constexpr = (segment_ptr is not None) or (range_ptr is not None)
    b, h, first_k = my_block(BLOCK_N, LAST_FIRST=False)
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    keys, ids_n = first_k + offs_n, load_ids(segment_ptr, b, first_k + offs_n, T)
    key_range = load_key_range(range_ptr, b, T)
    # the queries that may see one of these keys: none if all lie outside of the key range
    begin = first_k // BLOCK_M * BLOCK_M
    in_range = (first_k < key_range[1]) & (first_k + BLOCK_N > key_range[0])
    q_ptr = qkv_ptrs[0] + b * stride_b + h * D
    k_ptr = q_ptr + C + first_k.to(tl.int64) * stride_t
    k = load_tile(k_ptr, offs_n, stride_t, T - first_k, D, EVEN)
    v = load_tile(k_ptr + C, offs_n, stride_t, T - first_k, D, EVEN)
    q_ptr += begin.to(tl.int64) * stride_t
    do_ptr = out_ptrs[1] + (b * T + begin) * C + h * D
    dk, dv = tl.zeros_like(k).to(tl.float32), tl.zeros_like(v).to(tl.float32)
    for first_q in range(begin, tl.where(in_range, T, 0), BLOCK_M):
        q = load_tile(q_ptr, offs_m, stride_t, T - first_q, D, EVEN)
        do = load_tile(do_ptr, offs_m, C, T - first_q, D, EVEN)
        row, col = first_q + offs_m[None, :], keys[:, None]
        lse, delta = _load_stats(stats_ptrs, (b * H + h) * T, row, row < T)
        s = tl.dot(k, q.T, input_precision=PRECISION) * (scale * LOG2E) - lse
        ids_m = load_ids(segment_ptr, b, row, T)
        crosses = first_q < first_k + BLOCK_N
        # scores, not p: Triton 3.6 selects among p in every tile, instead of branching
        s = hide(s, HIDDEN, row, col, crosses, ids_m, ids_n[:, None], key_range, MASKED)
        p = tl.exp2(s)
        kept = p
        if dropout is not None:
            bits_ptrs = bit_rows(dropout[0] + (first_k >> 5), b * H + h, row, T, EVEN)
            keep = load_keep_of_keys(bits_ptrs, first_k, BLOCK_N)
            kept = tl.where(keep, p, 0.0)
        dv = tl.dot(kept.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, do.T, input_precision=PRECISION)
        ds = _score_gradient(p, kept, dp, delta, dropout)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        q_ptr, do_ptr = q_ptr + BLOCK_M * stride_t, do_ptr + BLOCK_M * C
    dk_ptr = qkv_ptrs[1] + (b * T + first_k) * 3 * C + C + h * D
    store_tile(dk_ptr, _rescaled(dk * scale, dropout), offs_n, 3 * C, T - first_k, D)
    store_tile(dk_ptr + C, _rescaled(dv, dropout), offs_n, 3 * C, T - first_k, D)


def launch_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    bits: Tensor | None,
    segment_ids: Tensor | None,
    key_range: Tensor | None,
    n_head: int,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """dqkv (B, T, 3C), side by side as in qkv."""
    dqkv = qkv.new_empty(qkv.shape)
    if dqkv.numel() > 0:
        # the gradient of .sum() is one number with strides of zero
        tensors = ((qkv, dqkv), (out, dout.contiguous()), (lse, torch.empty_like(lse)))
        options = (bits, segment_ids, key_range, n_head, dropout_p, scale)
        # the order matters: the second kernel reads the first one's delta
        launch(_attention_bwd_dq_kernel, "attention_bwd_dq", "BLOCK_M", tensors, qkv, *options)
        launch(_attention_bwd_dkv_kernel, "attention_bwd_dkv", "BLOCK_N", tensors, qkv, *options)
    return dqkv


def compile_cases(arch: str) -> list[CompileCase]:
    """Both kernels with every config of the table."""
    pair = ("*{}", "*{}")
    tensors = {"qkv_ptrs": pair, "out_ptrs": pair, "stats_ptrs": ("*fp32", "*fp32")}
    dq, dkv = _attention_bwd_dq_kernel, _attention_bwd_dkv_kernel
    return [
        *attention_cases(dq, "attention_bwd_dq", arch, tensors, 3, 6, "BLOCK_M"),
        *attention_cases(dkv, "attention_bwd_dkv", arch, tensors, 4, 6, "BLOCK_N"),
    ]
