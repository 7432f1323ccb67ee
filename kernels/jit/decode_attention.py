"""Attention of new tokens to a key/value cache, split over the keys where the cache is long.

A program owns one head of one new token and one share of its keys (all of them where there is one
share) and walks over them BLOCK_N at a time. Each of the BLOCK_N lanes keeps an online softmax of
its own (largest score m, sum total, weighted values acc), so that nothing is exchanged between
lanes until the loop ends; then the lanes are merged. Matrix units would have one row of work: the
product with the single query is a multiplication and a sum. The kernel is bound by memory, so the
loads of the next tiles are issued ahead.

With several shares, each writes its part, its m and its total in fp32, and a second kernel combines
the parts. The keys of a row, not of the cache, are divided among the shares, so their number does
not depend on the lengths: no host synchronisation, and a CUDA graph stays valid.

Before it, ``_append_kv_kernel`` writes the new tokens' keys and values, one program per token. Both
read the same lengths, those before the new tokens, so a step needs no others.

Grids (H, shares, B T), (B T H,) and (B T, blocks of heads). Bytes: the keys and values up to each
token once, 4 H D per key in bf16, where the tokens of a row share them in cache; FLOPs 4 H D per
key and token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels import tuning
from fastgpt2.kernels.cases import SIZES, CompileCase, Work, case, configs
from fastgpt2.kernels.jit.launch import launch_kernel
from fastgpt2.kernels.jit.primitives import HIDDEN, LOG2E, LOWEST, load_tile, store_tile

# reading so few keys takes less time than launching a second kernel
WHOLE_KEYS = 256
# minimum keys of the cache per share: one tile, so that batch 1 fills the GPU
SHARE_KEYS = 64
PROGRAMS_PER_MULTIPROCESSOR = 4
# parts that the merging program holds in registers
MAX_SHARES = 64
# tiles of keys and values that are loaded ahead
PREFETCH = tl.constexpr(3)


@triton.jit
def _append_kv_kernel(
    k_ptr,
    v_ptr,
    lengths_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_strides,
    v_strides,
    k_cache_strides,
    v_cache_strides,
    shape,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """cache[b, h, lengths[b] + t] = new[b, t, h] for keys and values, within the cache."""
    T, H, S = shape
    token, first_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * BLOCK_H
    b, t = token // T, token % T
    heads = tl.arange(0, BLOCK_H)
    slot = tl.load(lengths_ptr + b).to(tl.int64) + t
    n_heads = tl.where((slot >= 0) & (slot < S), H - first_h, 0)
    k_ptr += b * k_strides[0] + t * k_strides[1] + first_h * k_strides[2]
    v_ptr += b * v_strides[0] + t * v_strides[1] + first_h * v_strides[2]
    k_cache_ptr += b * k_cache_strides[0] + first_h * k_cache_strides[1] + slot * k_cache_strides[2]
    v_cache_ptr += b * v_cache_strides[0] + first_h * v_cache_strides[1] + slot * v_cache_strides[2]
    k = load_tile(k_ptr, heads, k_strides[2], n_heads, D, False)
    v = load_tile(v_ptr, heads, v_strides[2], n_heads, D, False)
    store_tile(k_cache_ptr, k, heads, k_cache_strides[1], n_heads, D)
    store_tile(v_cache_ptr, v, heads, v_cache_strides[1], n_heads, D)


@triton.jit
def _decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    out_ptr,
    stats_ptr,
    q_strides,
    k_strides,
    v_strides,
    shape,
    scale,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    T, S = shape
    h, token = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    b, t = token // T, token % T
    share = tl.program_id(1).to(tl.int64)
    # the new token sees itself
    length = tl.minimum(tl.load(lengths_ptr + b) + t + 1, S).to(tl.int32)
    share_keys = tl.cdiv(length, tl.num_programs(1) * BLOCK_N) * BLOCK_N
    begin = (share * share_keys).to(tl.int32)
    end = tl.minimum(begin + share_keys, length)
    offs_n, row = tl.arange(0, BLOCK_N), tl.zeros([1], tl.int32)
    q_ptr += b * q_strides[0] + t * q_strides[1] + h * q_strides[2]
    q = load_tile(q_ptr, row, 0, 1, D, True)
    q = q.to(tl.float32) * (scale * LOG2E)
    k_ptr += b * k_strides[0] + h * k_strides[1] + begin.to(tl.int64) * k_strides[2]
    v_ptr += b * v_strides[0] + h * v_strides[1] + begin.to(tl.int64) * v_strides[2]
    m = tl.full([BLOCK_N], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, q.shape[1]], tl.float32)
    for first in tl.range(begin, end, BLOCK_N, num_stages=PREFETCH):
        # what lies after the length is never read
        k = load_tile(k_ptr, offs_n, k_strides[2], end - first, D, False).to(tl.float32)
        v = load_tile(v_ptr, offs_n, v_strides[2], end - first, D, False).to(tl.float32)
        s = tl.where(first + offs_n < end, tl.sum(q * k, 1), HIDDEN)
        m_new = tl.maximum(m, s)
        p, alpha = tl.exp2(s - m_new), tl.exp2(m - m_new)
        total = total * alpha + p
        acc = acc * alpha[:, None] + p[:, None] * v
        m = m_new
        k_ptr += BLOCK_N * k_strides[2]
        v_ptr += BLOCK_N * v_strides[2]
    top = tl.max(m, 0)
    weight = tl.exp2(m - top)
    whole = tl.sum(total * weight, 0)
    # without a key the output is zero
    out = tl.sum(acc * weight[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    slot = (share * tl.num_programs(2) + token) * tl.num_programs(0) + h
    store_tile(out_ptr + slot * D, out[None, :], row, 0, 1, D)
    if stats_ptr is not None:
        tl.store(stats_ptr + 2 * slot, top)
        tl.store(stats_ptr + 2 * slot + 1, whole)


@triton.jit
def _decode_attention_merge_kernel(
    part_ptr, stats_ptr, out_ptr, shares, D: tl.constexpr, BLOCK_S: tl.constexpr
):
    """out = sum of the parts, each weighted with what it has of the sum of exp2(score)."""
    slot, slots = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    offs_s = tl.arange(0, BLOCK_S)
    stats_ptrs = stats_ptr + 2 * (offs_s * slots + slot)
    m = tl.load(stats_ptrs, mask=offs_s < shares, other=LOWEST)
    total = tl.load(stats_ptrs + 1, mask=offs_s < shares, other=0.0)
    weight = total * tl.exp2(m - tl.max(m, 0))
    whole = tl.sum(weight, 0)
    weight /= tl.where(whole == 0.0, 1.0, whole)
    parts = load_tile(part_ptr + slot * D, offs_s, slots * D, shares, D, False)
    out = tl.sum(parts * weight[:, None], 0)
    store_tile(out_ptr + slot * D, out[None, :], tl.zeros([1], tl.int32), 0, 1, D)


def count_shares(tokens: int, H: int, S: int, multiprocessors: int) -> int:
    """Among how many programs the keys of one head of one new token are divided."""
    if S <= WHOLE_KEYS:
        return 1
    wanted = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, tokens * H)
    return max(1, min(wanted, triton.cdiv(S, SHARE_KEYS), MAX_SHARES))


def launch_append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    """Write k and v (B, T, H, D) into the caches (B, H, S, D) from ``lengths`` on."""
    B, T, H, D = k.shape
    if k.numel() == 0:
        return
    config = tuning.pick("append_kv", tuning.arch_of(k.device))
    launch_kernel(
        _append_kv_kernel,
        (B * T, triton.cdiv(H, config["BLOCK_H"])),
        k,
        v,
        lengths,
        k_cache,
        v_cache,
        k.stride()[:3],
        v.stride()[:3],
        k_cache.stride()[:3],
        v_cache.stride()[:3],
        (T, H, k_cache.shape[2]),
        D=D,
        **config.meta(),
    )


def launch(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """out (B, T, H, D) in q's dtype."""
    B, T, H, D = q.shape
    S = k_cache.shape[2]
    out = q.new_empty(B, T, H, D)
    if out.numel() == 0:
        return out
    shares = count_shares(B * T, H, S, tuning.multiprocessors(q.device))
    whole = shares == 1
    part = out if whole else q.new_empty(shares, B, T, H, D, dtype=torch.float32)
    stats = None if whole else q.new_empty(shares, B, T, H, 2, dtype=torch.float32)
    config = tuning.pick("decode_attention", tuning.arch_of(q.device), D=D)
    launch_kernel(
        _decode_attention_kernel,
        (H, shares, B * T),
        q,
        k_cache,
        v_cache,
        lengths,
        part,
        stats,
        q.stride()[:3],
        k_cache.stride()[:3],
        v_cache.stride()[:3],
        (T, S),
        scale,
        D=D,
        **config.meta(),
    )
    if not whole:
        config = tuning.pick("decode_attention_merge", tuning.arch_of(q.device))
        launch_kernel(
            _decode_attention_merge_kernel,
            (B * T * H,),
            part,
            stats,
            out,
            shares,
            D=D,
            BLOCK_S=triton.next_power_of_2(shares),
            **config.meta(),
        )
    return out


def _case(config: tuning.Config, dtype: str, D: int, *, split: bool) -> CompileCase:
    B, H, S = 64, 12, 1024
    elements = 2.0 * B * H * S * D
    arguments = {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}"),
        "lengths_ptr": "*i64",
        "out_ptr": "*fp32" if split else f"*{dtype}",
        "stats_ptr": "*fp32" if split else None,
        # T = 1, in a tuple: Triton specialises on it
        "q_strides": ("i32",) * 3,
        "k_strides": ("i32",) * 3,
        "v_strides": ("i32",) * 3,
        "shape": ("constexpr", "i32"),
        "scale": "fp32",
        "D": D,
    }
    return case(
        _decode_attention_kernel,
        "decode_attention",
        config,
        f"D{D} {dtype}{' shares' * split}",
        arguments,
        bytes=elements * SIZES[dtype],
        flops=2 * elements,
        # per element of the keys: a product with q, and one of the weight with the value's
        work=Work(elements / 2, config["BLOCK_N"] * D, B * H * (4 if split else 1)),
    )


def _merge_case(config: tuning.Config) -> CompileCase:
    rows, D = 12, 128
    elements = float(rows * MAX_SHARES * D)
    arguments = {
        "part_ptr": "*fp32",
        "stats_ptr": "*fp32",
        "out_ptr": "*bf16",
        "shares": "i32",
        "D": D,
        "BLOCK_S": MAX_SHARES,
    }
    return case(
        _decode_attention_merge_kernel,
        "decode_attention_merge",
        config,
        f"D{D} bf16",
        arguments,
        bytes=4 * elements,
        flops=2 * elements,
        work=Work(elements, MAX_SHARES * D, rows),
        odd=("shares",),
    )


def _append_case(config: tuning.Config) -> CompileCase:
    B, H, D = 64, 12, 64
    arguments = {
        **dict.fromkeys(("k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr"), "*bf16"),
        "lengths_ptr": "*i64",
        **dict.fromkeys(
            ("k_strides", "v_strides", "k_cache_strides", "v_cache_strides"), ("i32",) * 3
        ),
        "shape": ("constexpr", "i32", "i32"),
        "D": D,
    }
    return case(
        _append_kv_kernel,
        "append_kv",
        config,
        f"D{D} bf16",
        arguments,
        bytes=8.0 * B * H * D,
        flops=0.0,
        work=Work(2.0 * B * H * D, 2 * H * D, B),
        odd=("shape.1",),
    )


def compile_cases(arch: str) -> list[CompileCase]:
    """One share and several at GPT-2's shape, 64 rows of 12 heads and 1024 keys; the merge."""
    return [
        *(_append_case(config) for _, config in configs("append_kv", arch)),
        *(
            _case(config, dtype, limits.get("D", 128), split=split)
            for limits, config in configs("decode_attention", arch)
            for dtype, split in (("bf16", False), ("bf16", True), ("fp32", False))
        ),
        *(_merge_case(config) for _, config in configs("decode_attention_merge", arch)),
    ]
