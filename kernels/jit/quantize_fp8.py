"""Rounding to FP8, written in both layouts that training multiplies.

With m the format's largest number and a = max |x|: q = round(x m / a), to the nearest even.

Two kernels. The first finds a: programs walk down columns of x in tiles [BLOCK_N, BLOCK_C], and
each stores the largest magnitude it has seen. The second reads x once more, a tile per program, and
writes q (N, C) and its transpose (C, N); both are coalesced, since the tile is turned within the
program. Every program of it computes a from the P stored numbers, which stay in the L2 cache, so
that there is no third launch and no atomic. Where a bound of |x| is known, the first is left out.

Magnitudes are compared as integers: the bits of |x| in fp32 are ordered as the numbers are, and
those of a NaN lie above infinity's. A floating-point maximum would lose a NaN.

Bytes per element in bf16: 2 to find a, 2 to read x again, 1 for each layout: 6 in all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels import tuning
from fastgpt2.kernels.cases import SIZES, CompileCase, Work, case, configs
from fastgpt2.kernels.gpus import GPUS, has_fp8
from fastgpt2.kernels.jit.launch import launch_kernel
from fastgpt2.kernels.jit.rows import as_rows, row_programs

# the bits of 2^-60, the magnitude that a tensor of zeros is scaled by
_SMALLEST = tl.constexpr((127 - 60) << 23)


@triton.jit
def _load(x_ptr, x_stride, offs_n, offs_c, N, C):
    mask = (offs_n < N)[:, None] & (offs_c < C)[None, :]
    x_ptrs = x_ptr + offs_n[:, None] * x_stride + offs_c[None, :]
    return tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _fp8_amax_kernel(
    x_ptr, partial_ptr, x_stride, N, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    pid_n, P = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    pid_c = tl.program_id(0).to(tl.int64)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    largest = tl.zeros([BLOCK_N, BLOCK_C], tl.int32)
    for start in range(pid_n * BLOCK_N, N, P * BLOCK_N):
        x = _load(x_ptr, x_stride, start + tl.arange(0, BLOCK_N), offs_c, N, C)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(partial_ptr + pid_c * P + pid_n, tl.max(tl.max(largest, axis=1), axis=0))


@triton.jit
def _quantize_fp8_kernel(
    x_ptr,
    partial_ptr,
    straight_ptr,
    turned_ptr,
    inverse_ptr,
    x_stride,
    shape,
    P,
    E5M2: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    N, C, padded_N = shape
    FORMAT: tl.constexpr = tl.float8e5 if E5M2 else tl.float8e4nv
    offs_p = tl.arange(0, BLOCK_P)
    bits = tl.max(tl.load(partial_ptr + offs_p, mask=offs_p < P, other=0), axis=0)
    amax = tl.maximum(bits, _SMALLEST).to(tl.float32, bitcast=True)
    m = tl.full([], 57344.0 if E5M2 else 448.0, tl.float32)
    pid_n, pid_c = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    if pid_n + pid_c == 0:
        tl.store(inverse_ptr, tl.div_rn(amax, m))
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    x = _load(x_ptr, x_stride, offs_n, offs_c, N, C)
    # divide as PyTorch divides by a tensor, for the same bits
    q = (x * (tl.div_rn(1.0, amax) * m)).to(FORMAT)
    mask_c = offs_c < C
    if straight_ptr is not None:
        straight_ptrs = straight_ptr + offs_n[:, None] * C + offs_c[None, :]
        tl.store(straight_ptrs, q, mask=(offs_n < N)[:, None] & mask_c[None, :])
    if turned_ptr is not None:
        turned_ptrs = turned_ptr + offs_c[:, None] * padded_N + offs_n[None, :]
        tl.store(turned_ptrs, tl.trans(q), mask=mask_c[:, None] & (offs_n < padded_N)[None, :])


def _partial_amax(rows: Tensor) -> Tensor:
    """(P,): the bits of P magnitudes, the largest of which is that of the rows."""
    N, C = rows.shape
    config = tuning.pick("fp8_amax", tuning.arch_of(rows.device))
    columns = triton.cdiv(C, config["BLOCK_C"])
    grid = (columns, row_programs(config, N, rows.device, columns=columns))
    partial = rows.new_empty(grid[0] * grid[1], dtype=torch.int32)
    launch_kernel(_fp8_amax_kernel, grid, rows, partial, rows.stride(0), N, C, **config.meta())
    return partial


def launch(
    x: Tensor, amax: Tensor | None, dtype: torch.dtype, padded_N: int, straight: bool, turned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(q (N, C), its transpose (C, padded_N), a / m) of x (N, C); a layout not wanted is empty.

    ``padded_N`` is at least N, and at most the next multiple of 16: what is beyond N is zero.
    """
    (N, C), rows = x.shape, as_rows(x)
    q = x.new_empty((N, C) if straight else (0,), dtype=dtype)
    q_turned = x.new_empty((C, padded_N) if turned else (0,), dtype=dtype)
    inverse = x.new_empty((), dtype=torch.float32)
    partial = _partial_amax(rows) if amax is None else amax.reshape(1).view(torch.int32)
    config = tuning.pick("quantize_fp8", tuning.arch_of(x.device))
    launch_kernel(
        _quantize_fp8_kernel,
        (triton.cdiv(C, config["BLOCK_C"]), triton.cdiv(N, config["BLOCK_N"])),
        rows,
        partial,
        q if straight else None,
        q_turned if turned else None,
        inverse,
        rows.stride(0),
        (N, C, padded_N),
        partial.shape[0],
        E5M2=dtype == torch.float8_e5m2,
        BLOCK_P=triton.next_power_of_2(partial.shape[0]),
        **config.meta(),
    )
    return q, q_turned, inverse


# 64 x 1024 tokens of GPT-2's MLP
_TOKENS, _F = 65536, 3072


def _amax_case(config: tuning.Config, dtype: str) -> CompileCase:
    arguments = {"x_ptr": f"*{dtype}", "partial_ptr": "*i32", "x_stride": "i32"}
    elements = float(_TOKENS * _F)
    return case(
        _fp8_amax_kernel,
        "fp8_amax",
        config,
        dtype,
        arguments | {"N": "i32", "C": "i32"},
        bytes=elements * SIZES[dtype],
        flops=elements,
        work=Work(elements, config["BLOCK_N"] * config["BLOCK_C"]),
    )


def _case(
    config: tuning.Config, arch: str, dtype: str, e5m2: bool, layouts: tuple[bool, bool]
) -> CompileCase:
    straight, turned = layouts
    kind = "*fp8e5" if e5m2 else "*fp8e4nv"
    per_sm = configs("fp8_amax", arch)[0][1].per_sm
    multiprocessors = next(gpu.multiprocessors for gpu in GPUS.values() if gpu.arch == arch)
    arguments = {
        "x_ptr": f"*{dtype}",
        "partial_ptr": "*i32",
        "straight_ptr": kind if straight else None,
        "turned_ptr": kind if turned else None,
        "inverse_ptr": "*fp32",
        "x_stride": "i32",
        "shape": ("i32", "i32", "i32"),
        "P": "i32",
        "E5M2": e5m2,
        "BLOCK_P": triton.next_power_of_2(per_sm * multiprocessors),
    }
    elements, turn = _TOKENS * _F, config["BLOCK_N"] * config["BLOCK_C"]
    names = "straight" * straight + " and " * (straight and turned) + "turned" * turned
    return case(
        _quantize_fp8_kernel,
        "quantize_fp8",
        config,
        f"{dtype} {'e5m2' if e5m2 else 'e4m3'} {names}",
        arguments,
        bytes=float(elements * (SIZES[dtype] + straight + turned)),
        flops=2.0 * elements,
        work=Work(float(elements), turn, elements // turn),
        odd=("P",),
    )


def compile_cases(arch: str) -> list[CompileCase]:
    """Both formats in both layouts, and one layout; none where the tensor cores have no FP8."""
    if not has_fp8(arch):
        return []
    both, straight = (True, True), (True, False)
    return [
        _amax_case(config, dtype)
        for _, config in configs("fp8_amax", arch)
        for dtype in ("bf16", "fp32")
    ] + [
        _case(config, arch, dtype, e5m2, layouts)
        for _, config in configs("quantize_fp8", arch)
        for dtype, e5m2, layouts in (
            ("bf16", False, both),
            ("bf16", True, both),
            ("fp32", False, both),
            ("bf16", False, straight),
        )
    ]
