"""The MLP's first half as one kernel: projection, bias and GELU.

A program computes one tile [BLOCK_M, BLOCK_N] of y (N, F) = gelu(x (N, C) @ weight (F, C)^T + bias)
over all of C, in fp32, and also stores the product without the bias, z: the same as the unfused
route (a library's product, then ``bias_gelu``) saves, so backward is the same.
Grid (cdiv(N, BLOCK_M) cdiv(F, BLOCK_N),), in groups of GROUP_M tiles down the rows, so that the
tiles under way share their operands in L2. FLOPs 2 N F C; bytes x, weight, y and z once, at best:
the unfused route reads z once more.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels import tuning
from fastgpt2.kernels.cases import SIZES, CompileCase, Work, case, configs
from fastgpt2.kernels.jit.gelu import gelu_tile
from fastgpt2.kernels.jit.launch import launch_kernel
from fastgpt2.kernels.jit.primitives import allows_tf32
from fastgpt2.kernels.jit.rows import as_rows


@triton.jit
def _tile_of(pid, N, F, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of a program's tile: down GROUP_M rows of tiles, then to the next column."""
    tiles_m, tiles_n = tl.cdiv(N, BLOCK_M), tl.cdiv(F, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    place = pid % (GROUP_M * tiles_n)
    return group * GROUP_M + place % height, place // height


@triton.jit
def _epilogue(
    z, bias_ptr, y_ptr, z_ptr, start, first_n, mask_m, F,
    ERF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store a tile of z, add the bias, store its GELU."""
    offs_n = tl.arange(0, BLOCK_N)
    offs = tl.arange(0, BLOCK_M)[:, None] * F + offs_n[None, :]
    mask_n = offs_n < F - first_n
    mask = mask_m[:, None] & mask_n[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + start + offs, z, mask=mask)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + first_n + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + start + offs, gelu_tile(z, ERF), mask=mask)


@triton.jit
def _linear_gelu_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    z_ptr,
    x_strides,
    weight_strides,
    shape,
    TF32: tl.constexpr,
    ERF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    N, F, C = shape
    tile_m, tile_n = _tile_of(tl.program_id(0).to(tl.int64), N, F, BLOCK_M, BLOCK_N, GROUP_M)
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    # within a tile, offsets are int32: half the registers
    offs_m, offs_n, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < N - first_m, offs_n < F - first_n
    # rows beyond the end repeat the tile's first row: read without a mask, never stored
    rows, columns = tl.where(mask_m, offs_m, 0), tl.where(mask_n, offs_n, 0)
    x_ptr += first_m * x_strides[0]
    weight_ptr += first_n * weight_strides[0]
    x_ptrs = x_ptr + rows[:, None] * x_strides[0] + offs_k[None, :] * x_strides[1]
    w_ptrs = weight_ptr + columns[None, :] * weight_strides[0] + offs_k[:, None] * weight_strides[1]
    z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_K):
        mask_k = offs_k < C - start
        x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k[:, None], other=0.0)
        z = tl.dot(x, w, z, input_precision="tf32" if TF32 else "ieee")
        x_ptrs += BLOCK_K * x_strides[1]
        w_ptrs += BLOCK_K * weight_strides[1]
    # finish half the columns at a time: the GELU of a whole tile does not fit in the registers
    HALF: tl.constexpr = BLOCK_N // 2
    left, right = tl.split(tl.reshape(z, [BLOCK_M, 2, HALF]).permute(0, 2, 1))
    start = first_m * F + first_n
    _epilogue(left, bias_ptr, y_ptr, z_ptr, start, first_n, mask_m, F, ERF, BLOCK_M, HALF)
    start, first_n = start + HALF, first_n + HALF
    _epilogue(right, bias_ptr, y_ptr, z_ptr, start, first_n, mask_m, F, ERF, BLOCK_M, HALF)


def launch_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, form: str, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """(y, z): z is x @ weight.T without the bias, empty without grad."""
    (F, C), shape = weight.shape, (*x.shape[:-1], weight.shape[0])
    y = x.new_empty(shape)
    z = x.new_empty(shape if with_grad else 0)
    if y.numel() > 0:
        rows = as_rows(x)
        N = rows.shape[0]
        arch = tuning.arch_of(x.device)
        config = tuning.pick("linear_gelu_fwd", arch, bytes=x.element_size())
        grid = (triton.cdiv(N, config["BLOCK_M"]) * triton.cdiv(F, config["BLOCK_N"]),)
        launch_kernel(
            _linear_gelu_fwd_kernel,
            grid,
            rows,
            weight,
            bias,
            y,
            z if with_grad else None,
            rows.stride(),
            weight.stride(),
            (N, F, C),
            TF32=allows_tf32(x),
            ERF=form == "erf",
            **config.meta(),
        )
    return y, z


# 64 x 1024 tokens of GPT-2's MLP
_TOKENS, _C, _F = 65536, 768, 3072


def compile_cases(arch: str) -> list[CompileCase]:
    """In both forms; in bf16 with everything stored, in fp32 without what only backward needs."""
    cases = []
    for limits, config in configs("linear_gelu_fwd", arch):
        dtype = "bf16" if limits.get("bytes") == 2 else "fp32"
        shared = {
            "x_ptr": f"*{dtype}",
            "weight_ptr": f"*{dtype}",
            "bias_ptr": f"*{dtype}",
            "y_ptr": f"*{dtype}",
            "z_ptr": f"*{dtype}" if dtype == "bf16" else None,
            "x_strides": ("i32", "constexpr"),
            "weight_strides": ("i32", "constexpr"),
            "shape": ("i32", "i32", "i32"),
            "TF32": False,
        }
        moved = _TOKENS * (_C + 2 * _F) + _F * _C
        blocks = _TOKENS * _F // (config["BLOCK_M"] * config["BLOCK_N"])
        turns = blocks * _C // config["BLOCK_K"]
        cases += [
            case(
                _linear_gelu_fwd_kernel,
                "linear_gelu_fwd",
                config,
                dtype + " erf" * erf,
                shared | {"ERF": erf},
                bytes=float(moved * SIZES[dtype]),
                flops=2.0 * _TOKENS * _C * _F,
                wants_mma=dtype == "bf16",
                work=Work(turns, grid=blocks, unit="tile"),
            )
            for erf in (False, True)
        ]
    return cases
