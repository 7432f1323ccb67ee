"""Causal attention backward: two kernels, no atomics, the same bits every time.

With P = softmax(S), dP = dO V^T, and dropout's mask and factor M (all ones without dropout),

    dV = (P M)^T dO,    dS = P (dP M - delta),    dQ = scale dS K,    dK = scale dS^T Q

where delta_i = sum_j P_ij (dP M)_ij = dO_i . O_i, so no second pass over a row is needed. P is
made again from q, k and the saved lse. The first kernel owns BLOCK_M queries and walks over their
keys: it sums up dq, and stores delta for the second one, which owns BLOCK_N keys and walks over
the queries that see them. That one computes the transposed tiles K Q^T and V dO^T, so that P^T and
dS^T come out of one product as the left operands of the next without being transposed (which
Hopper's compilers have got wrong). Scores and dP are computed twice, seven products instead of
five: the price of having neither atomics nor an fp32 copy of dq.

Grids (B H cdiv(T, BLOCK),), longest programs first. Bytes: qkv, out, dout and dqkv, 16 B T C in
bf16 if each moved once; FLOPs 7 B T^2 C, of which 5 B T^2 C count as work.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels.jit.attention_parts import (
    assign,
    attention_cases,
    launch,
    load_ids,
    load_key_range,
    visible,
)
from fastgpt2.kernels.jit.compile import CompileCase
from fastgpt2.kernels.jit.primitives import LOG2E, keep_mask, load_tile, store_tile


@triton.jit
def _attention_bwd_dq_kernel(
    qkv_ptr,
    out_ptr,
    dout_ptr,
    dqkv_ptr,
    stats,
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
    _, _, H, T = shape
    stride_b, stride_t = strides
    lse_ptr, delta_ptr = stats
    MASKED: tl.constexpr = (segment_ptr is not None) or (range_ptr is not None)
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(D))
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    C = H * D
    n_blocks = tl.cdiv(T, BLOCK_M)
    head, rank = assign(shape, n_blocks)
    b, h = (head // H).to(tl.int64), head % H
    head = head.to(tl.int64)
    first_q = (n_blocks - 1 - rank) * BLOCK_M
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    queries, n_rows = first_q + offs_m, T - first_q
    ids_m = load_ids(segment_ptr, b, queries, T)
    key_range = load_key_range(range_ptr, b, T)
    begin = key_range[0] // BLOCK_N * BLOCK_N
    q_ptr = qkv_ptr + b * stride_b + h * D
    k_ptr = q_ptr + C + begin.to(tl.int64) * stride_t
    q_ptr += first_q.to(tl.int64) * stride_t
    offset = (b * T + first_q) * C + h * D
    q = load_tile(q_ptr, offs_m, stride_t, n_rows, D, BLOCK_D, EVEN)
    do = load_tile(dout_ptr + offset, offs_m, C, n_rows, D, BLOCK_D, EVEN)
    out = load_tile(out_ptr + offset, offs_m, C, n_rows, D, BLOCK_D, EVEN)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + head * T + queries, delta, mask=queries < T)
    lse = tl.load(lse_ptr + head * T + queries, mask=queries < T, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    log2_scale = scale * LOG2E
    for first_k in range(begin, tl.minimum(first_q + BLOCK_M, key_range[1]), BLOCK_N):
        keys = first_k + offs_n
        k = load_tile(k_ptr, offs_n, stride_t, T - first_k, D, BLOCK_D, EVEN)
        v = load_tile(k_ptr + C, offs_n, stride_t, T - first_k, D, BLOCK_D, EVEN)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        p = tl.exp2(s * log2_scale - lse[:, None])
        if MASKED:
            ids_n = load_ids(segment_ptr, b, keys, T)
            seen = visible(
                queries[:, None], keys[None, :], ids_m[:, None], ids_n[None, :], key_range
            )
            p = tl.where(seen, p, 0.0)
        elif first_k + BLOCK_N > first_q:
            p = tl.where(keys[None, :] <= queries[:, None], p, 0.0)
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        if dropout is not None:
            keep = keep_mask(dropout, (head * T + queries[:, None]) * T + keys[None, :])
            dp = tl.where(keep, dp * (1.0 / (1.0 - dropout[1])), 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        k_ptr += BLOCK_N * stride_t
    dq_ptr = dqkv_ptr + (b * T + first_q) * 3 * C + h * D
    store_tile(dq_ptr, dq * scale, offs_m, 3 * C, n_rows, D, BLOCK_D)


@triton.jit
def _attention_bwd_dkv_kernel(
    qkv_ptr,
    dout_ptr,
    dqkv_ptr,
    stats,
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
    _, _, H, T = shape
    stride_b, stride_t = strides
    lse_ptr, delta_ptr = stats
    MASKED: tl.constexpr = (segment_ptr is not None) or (range_ptr is not None)
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(D))
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    C = H * D
    head, rank = assign(shape, tl.cdiv(T, BLOCK_N))
    b, h = (head // H).to(tl.int64), head % H
    head = head.to(tl.int64)
    first_k = rank * BLOCK_N
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    keys, n_rows = first_k + offs_n, T - first_k
    ids_n = load_ids(segment_ptr, b, keys, T)
    key_range = load_key_range(range_ptr, b, T)
    q_ptr = qkv_ptr + b * stride_b + h * D
    k_ptr = q_ptr + C + first_k.to(tl.int64) * stride_t
    k = load_tile(k_ptr, offs_n, stride_t, n_rows, D, BLOCK_D, EVEN)
    v = load_tile(k_ptr + C, offs_n, stride_t, n_rows, D, BLOCK_D, EVEN)
    # no query before the keys sees them
    begin = first_k // BLOCK_M * BLOCK_M
    q_ptr += begin.to(tl.int64) * stride_t
    do_ptr = dout_ptr + (b * T + begin) * C + h * D
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    log2_scale = scale * LOG2E
    for first_q in range(begin, T, BLOCK_M):
        queries = first_q + offs_m
        q = load_tile(q_ptr, offs_m, stride_t, T - first_q, D, BLOCK_D, EVEN)
        do = load_tile(do_ptr, offs_m, C, T - first_q, D, BLOCK_D, EVEN)
        lse = tl.load(lse_ptr + head * T + queries, mask=queries < T, other=0.0)
        delta = tl.load(delta_ptr + head * T + queries, mask=queries < T, other=0.0)
        # queries behind T are zeros: p is 1 there, but do, dp and delta are 0
        s = tl.dot(k, q.T, input_precision=PRECISION)
        p = tl.exp2(s * log2_scale - lse[None, :])
        if MASKED:
            ids_m = load_ids(segment_ptr, b, queries, T)
            seen = visible(
                queries[None, :], keys[:, None], ids_m[None, :], ids_n[:, None], key_range
            )
            p = tl.where(seen, p, 0.0)
        elif first_q < first_k + BLOCK_N:
            p = tl.where(keys[:, None] <= queries[None, :], p, 0.0)
        if dropout is not None:
            keep = keep_mask(dropout, (head * T + queries[None, :]) * T + keys[:, None])
            dv = tl.dot(tl.where(keep, p, 0.0).to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.dot(v, do.T, input_precision=PRECISION)
            dp = tl.where(keep, dp * (1.0 / (1.0 - dropout[1])), 0.0)
        else:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.dot(v, do.T, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        q_ptr += BLOCK_M * stride_t
        do_ptr += BLOCK_M * C
    if dropout is not None:
        dv *= 1.0 / (1.0 - dropout[1])
    dk_ptr = dqkv_ptr + (b * T + first_k) * 3 * C + C + h * D
    store_tile(dk_ptr, dk * scale, offs_n, 3 * C, n_rows, D, BLOCK_D)
    store_tile(dk_ptr + C, dv, offs_n, 3 * C, n_rows, D, BLOCK_D)


def launch_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    segment_ids: Tensor | None,
    key_range: Tensor | None,
    n_head: int,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """dqkv (B, T, 3C), side by side as in qkv."""
    dqkv = qkv.new_empty(qkv.shape)
    if dqkv.numel() > 0:
        # .sum() and the like hand down one number with strides of zero
        dout = dout.contiguous()
        stats = (lse, torch.empty_like(lse))
        options = (seed, segment_ids, key_range, n_head, dropout_p, scale)
        tensors = (qkv, out, dout, dqkv, stats)
        launch(_attention_bwd_dq_kernel, "attention_bwd_dq", "BLOCK_M", tensors, qkv, *options)
        tensors = (qkv, dout, dqkv, stats)
        launch(_attention_bwd_dkv_kernel, "attention_bwd_dkv", "BLOCK_N", tensors, qkv, *options)
    return dqkv


def compile_cases(arch: str) -> list[CompileCase]:
    """Both kernels with every config of the table."""
    shared = {"qkv_ptr": "*{}", "dout_ptr": "*{}", "dqkv_ptr": "*{}", "stats": ("*fp32", "*fp32")}
    dq, dkv = _attention_bwd_dq_kernel, _attention_bwd_dkv_kernel
    return [
        *attention_cases(dq, "attention_bwd_dq", arch, {"out_ptr": "*{}", **shared}, 3, 6),
        *attention_cases(dkv, "attention_bwd_dkv", arch, shared, 4, 6),
    ]
