"""What the row-wise kernels share: views as rows, dropout of a tile, sums over all rows.

A sum over all N rows (the gradient of a bias) has two stages, so that it needs no atomics and has
the same bits every time: each program of a backward kernel sums its own rows into one row of an
fp32 buffer (K, P, C), K sums by P programs; then ``_column_sum_kernel`` adds up the P rows, one
program per block of columns and sum. That second stage moves 4 K P C bytes, from L2 cache.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels import tuning
from fastgpt2.kernels.cases import CompileCase, Work, case, configs
from fastgpt2.kernels.jit.launch import launch_kernel
from fastgpt2.kernels.jit.primitives import keep_words


def as_rows(x: Tensor) -> Tensor:
    """(..., C) as (N, C) with adjacent columns: a view wherever the strides allow one."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def row_programs(config: tuning.Config, N: int, device: torch.device, *, columns: int = 1) -> int:
    """P: how many programs share the blocks of N rows, for each of ``columns`` blocks of columns.

    As many as are resident at a time: fewer leave bandwidth unused, more wait for a second wave.
    """
    resident = config.per_sm * tuning.multiprocessors(device)
    return min(triton.cdiv(N, config["BLOCK_N"]), max(1, resident // columns))


@triton.constexpr_function
def row_width(C: int) -> int:
    """BLOCK_C of a kernel that holds rows whole: a power of two, and whole Philox groups."""
    return max(4, triton.next_power_of_2(C))


def dropout_argument(seed: Tensor | None, p: float) -> tuple[Tensor, float] | None:
    """The argument of ``dropout_tile``; None without a seed: a kernel without random numbers."""
    return None if seed is None else (seed, p)


@triton.jit
def dropout_tile(x, dropout, rows, width, first_column):
    """Philox dropout of a tile of rows of ``width`` elements, from ``first_column`` on.

    ``dropout`` is (seed_ptr, p); rows are global and int64, the first column a multiple of 4.
    """
    groups = first_column // 4 + tl.arange(0, x.shape[1] // 4)
    a, b, c, d = keep_words(dropout, rows, width, groups)
    # columns 0 ... 3 of each group side by side: join adds a last dimension
    keep = tl.join(tl.join(a.to(tl.int8), c.to(tl.int8)), tl.join(b.to(tl.int8), d.to(tl.int8)))
    keep = tl.reshape(keep, x.shape)
    return tl.where(keep != 0, x * (1.0 / (1.0 - dropout[1])), 0.0)


@triton.jit
def _column_sum_kernel(partial_ptr, out_ptrs, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """out_ptrs[k][c] = sum over p of partial[k, p, c]; program (block of columns, k)."""
    which = tl.program_id(1).to(tl.int64)
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        offsets = (which * P + offs_p)[:, None] * C + offs_c[None, :]
        sums += tl.load(partial_ptr + offsets, mask=(offs_p < P)[:, None] & mask_c, other=0.0)
    total = tl.sum(sums, axis=0)
    # the outputs may differ in dtype, so choosing one takes a branch
    for k in tl.static_range(len(out_ptrs)):
        if which == k:
            tl.store(out_ptrs[k] + offs_c, total, mask=mask_c)


def launch_column_sum(partial: Tensor, outs: Sequence[Tensor]) -> None:
    """Sum ``partial`` (K, P, C) over P into the K ``outs`` (C,), each in its own dtype."""
    K, P, C = partial.shape
    config = tuning.pick("column_sum", tuning.arch_of(partial.device))
    grid = (triton.cdiv(C, config["BLOCK_C"]), K)
    launch_kernel(_column_sum_kernel, grid, partial, tuple(outs), P, C, **config.meta())


def compile_cases(arch: str) -> list[CompileCase]:
    """The second stage as LayerNorm's backward uses it at C = 768: three sums of bf16."""
    P, C = 1056, 768
    arguments = {"partial_ptr": "*fp32", "out_ptrs": ("*bf16",) * 3, "P": "i32", "C": "i32"}
    moved, name = 3.0 * P * C * 4, "column_sum"
    return [
        case(
            _column_sum_kernel,
            name,
            config,
            "bf16",
            arguments,
            bytes=moved,
            flops=moved / 4,
            work=Work(moved / 4, config["BLOCK_P"] * config["BLOCK_C"], 3 * C // config["BLOCK_C"]),
        )
        for _, config in configs(name, arch)
    ]
