"""Causal attention forward over packed queries, keys and values.

A program owns BLOCK_M queries of one head and walks over their keys, BLOCK_N at a time, with the
online softmax: m is the largest score so far, total the sum of exp2(score - m), acc the values with
these weights; total and acc are rescaled when m grows. Only a tile that the diagonal crosses is
masked, by a branch inside one software pipeline: two loops would drain it in between.

Grid (H, cdiv(T, BLOCK_M), B). Saved for backward: out, and for each row the log2 of its sum of
exp2(score), lse (B, H, T) in fp32. Bytes: q, k, v read in place from (B, T, 3C), out (B, T, C)
written, 8 B T C in bf16, as k and v stay in the L2 cache; FLOPs 2 B T^2 C, half of 4 B T^2 C
because the tiles beyond the diagonal are skipped.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels.cases import CompileCase
from fastgpt2.kernels.jit.attention_dropout import bit_rows, drop, load_keep, words_until_next
from fastgpt2.kernels.jit.attention_parts import (
    attention_cases,
    hide,
    launch,
    load_ids,
    load_key_range,
    my_block,
)
from fastgpt2.kernels.jit.primitives import (
    HIDDEN,
    LOG2E,
    LOWEST,
    load_tile,
    store_tile,
)


@triton.jit
def _online_softmax(s, m, total, acc, log2_scale):
    """(p, m, total, acc): one tile of scores, and the running sums rescaled to its maximum."""
    m_new = tl.maximum(m, tl.max(s, 1) * log2_scale)
    p = tl.exp2(s * log2_scale - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    return p, m_new, total * alpha + tl.sum(p, 1), acc * alpha[:, None]


@triton.jit
def _attention_fwd_kernel(
    qkv_ptr,
    out_ptr,
    lse_ptr,
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
    q_ptr = qkv_ptr + b * stride_b + h * D
    k_ptr = q_ptr + C + begin.to(tl.int64) * stride_t
    q_ptr += first_q.to(tl.int64) * stride_t
    q = load_tile(q_ptr, offs_m, stride_t, T - first_q, D, EVEN)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if dropout is not None:
        bits_ptrs = bit_rows(dropout[0], b * H + h, queries, T, EVEN)[:, None] + (begin >> 5)
    acc = tl.zeros([BLOCK_M, q.shape[1]], tl.float32)
    for first_k in range(begin, tl.minimum(first_q + BLOCK_M, key_range[1]), BLOCK_N):
        k = load_tile(k_ptr, offs_n, stride_t, T - first_k, D, EVEN)
        v = load_tile(k_ptr + C, offs_n, stride_t, T - first_k, D, EVEN)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        row, col = queries[:, None], first_k + offs_n[None, :]
        ids_n = load_ids(segment_ptr, b, col, T)
        crosses = first_k + BLOCK_N > first_q
        s = hide(s, HIDDEN, row, col, crosses, ids_m[:, None], ids_n, key_range, MASKED)
        p, m, total, acc = _online_softmax(s, m, total, acc, scale * LOG2E)
        if dropout is not None:
            keep = load_keep(bits_ptrs, first_k, offs_n[None, :], BLOCK_N)
            bits_ptrs += words_until_next(first_k, BLOCK_N)
            p = drop(p, keep, dropout)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        k_ptr += BLOCK_N * stride_t
    # a query that sees nothing has a total of 0 and acc = 0: its output is zero
    total = tl.where(total == 0.0, 1.0, total)
    weight = 1.0 / total
    if dropout is not None:
        weight /= 1.0 - dropout[1]
    out_ptr += (b * T + first_q) * C + h * D
    store_tile(out_ptr, acc * weight[:, None], offs_m, C, T - first_q, D)
    tl.store(lse_ptr + (b * H + h) * T + queries, m + tl.log2(total), mask=queries < T)


def launch_fwd(
    qkv: Tensor,
    bits: Tensor | None,
    segment_ids: Tensor | None,
    key_range: Tensor | None,
    n_head: int,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse): (B, T, C) in qkv's dtype, (B, H, T) in fp32."""
    B, T, three_C = qkv.shape
    out = qkv.new_empty(B, T, three_C // 3)
    lse = qkv.new_empty(B, n_head, T, dtype=torch.float32)
    if out.numel() > 0:
        options = (bits, segment_ids, key_range, n_head, dropout_p, scale)
        tensors = (qkv, out, lse)
        launch(_attention_fwd_kernel, "attention_fwd", "BLOCK_M", tensors, qkv, *options)
    return out, lse


def compile_cases(arch: str) -> list[CompileCase]:
    """The forward kernel with every config of the table."""
    tensors = {"qkv_ptr": "*{}", "out_ptr": "*{}", "lse_ptr": "*fp32"}
    return attention_cases(_attention_fwd_kernel, "attention_fwd", arch, tensors, 2, 4, "BLOCK_M")
