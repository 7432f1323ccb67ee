"""The residual addition that ends a block, forward and backward: x + dropout(branch + bias).

Forward: one tile [BLOCK_N, BLOCK_C] per program, in the order of memory. Only the seed of the
dropout is saved. Bytes per element in bf16: 6, for x, branch and sum.

Backward: the gradient of x is that of the sum; without dropout and in one dtype, so is the
branch's. Then the kernel only sums it over the rows for the bias. P x cdiv(C, BLOCK_C) programs;
each walks down its columns and keeps their sum in registers; ``rows`` has the second stage. Bytes
per element in bf16: 2, or 4 if the branch has a gradient of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels import tuning
from fastgpt2.kernels.cases import SIZES, CompileCase, Work, case, configs
from fastgpt2.kernels.jit.launch import launch_kernel
from fastgpt2.kernels.jit.rows import (
    as_rows,
    dropout_argument,
    dropout_tile,
    launch_column_sum,
    row_programs,
)


@triton.jit
def _add_branch_fwd_kernel(
    x_ptr,
    branch_ptr,
    bias_ptr,
    y_ptr,
    row_strides,
    dropout,
    shape,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    N, C = shape
    x_stride, branch_stride = row_strides
    pid, column_blocks = tl.program_id(0).to(tl.int64), tl.cdiv(C, BLOCK_C)
    offs_n = pid // column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = pid % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_n < N)[:, None] & mask_c[None, :]
    branch_ptrs = branch_ptr + offs_n[:, None] * branch_stride + offs_c[None, :]
    update = tl.load(branch_ptrs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        update += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    offs_out = offs_n[:, None] * C + offs_c[None, :]
    if dropout is not None:
        update = dropout_tile(update, dropout, offs_n, C, pid % column_blocks * BLOCK_C)
    x_ptrs = x_ptr + offs_n[:, None] * x_stride + offs_c[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs_out, x + update, mask=mask)


@triton.jit
def _add_branch_bwd_kernel(
    dy_ptr,
    dbranch_ptr,
    partial_ptr,
    dy_stride,
    dropout,
    shape,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    N, C = shape
    pid_n, P = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first_c = tl.program_id(0).to(tl.int64) * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    dbias = tl.zeros([BLOCK_C], tl.float32)
    for start in range(pid_n * BLOCK_N, N, P * BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = (offs_n < N)[:, None] & mask_c[None, :]
        dy_ptrs = dy_ptr + offs_n[:, None] * dy_stride + offs_c[None, :]
        dbranch = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        offs_out = offs_n[:, None] * C + offs_c[None, :]
        if dropout is not None:
            dbranch = dropout_tile(dbranch, dropout, offs_n, C, first_c)
        if dbranch_ptr is not None:
            tl.store(dbranch_ptr + offs_out, dbranch, mask=mask)
        if partial_ptr is not None:
            dbias += tl.sum(dbranch, axis=0)
    if partial_ptr is not None:
        tl.store(partial_ptr + pid_n * C + offs_c, dbias, mask=mask_c)


def launch_fwd(
    x: Tensor, branch: Tensor, bias: Tensor | None, seed: Tensor | None, dropout_p: float
) -> Tensor:
    """x + dropout(branch + bias), in x's shape and dtype."""
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    rows, branch_rows = as_rows(x), as_rows(branch)
    N, C = rows.shape
    config = tuning.pick("add_branch_fwd", tuning.arch_of(x.device))
    grid = (triton.cdiv(N, config["BLOCK_N"]) * triton.cdiv(C, config["BLOCK_C"]),)
    launch_kernel(
        _add_branch_fwd_kernel,
        grid,
        rows,
        branch_rows,
        bias,
        y,
        (rows.stride(0), branch_rows.stride(0)),
        dropout_argument(seed, dropout_p),
        (N, C),
        **config.meta(),
    )
    return y


def launch_bwd(
    dy: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(dbranch, dbias): dbranch is empty where it equals dy, dbias without a bias."""
    own_dbranch = seed is not None or dy.dtype != branch_dtype
    dbranch = dy.new_empty(dy.shape if own_dbranch else 0, dtype=branch_dtype)
    dbias = dy.new_empty(0) if bias is None else torch.empty_like(bias)
    if dy.numel() == 0:
        return dbranch, dbias.zero_()
    if not own_dbranch and bias is None:
        return dbranch, dbias
    rows = as_rows(dy)
    N, C = rows.shape
    config = tuning.pick("add_branch_bwd", tuning.arch_of(dy.device))
    column_blocks = triton.cdiv(C, config["BLOCK_C"])
    P = row_programs(config, N, dy.device, columns=column_blocks)
    partial = None if bias is None else dy.new_empty(1, P, C, dtype=torch.float32)
    launch_kernel(
        _add_branch_bwd_kernel,
        (column_blocks, P),
        rows,
        dbranch if own_dbranch else None,
        partial,
        rows.stride(0),
        dropout_argument(seed, dropout_p),
        (N, C),
        **config.meta(),
    )
    if partial is not None:
        launch_column_sum(partial, [dbias])
    return dbranch, dbias


# (stream's dtype, branch's dtype, dropout), at 64 x 1024 tokens of GPT-2
_VARIANTS = (("bf16", "bf16", False), ("fp32", "bf16", True))
_TOKENS, _C = 65536, 768


def _case(op: str, config: tuning.Config, stream: str, branch: str, dropout: bool) -> CompileCase:
    arguments = {"dropout": ("*i64", "fp32") if dropout else None, "shape": ("i32", "i32")}
    if op == "add_branch_fwd":
        kernel, moved = _add_branch_fwd_kernel, 2 * SIZES[stream] + SIZES[branch]
        arguments |= {
            "x_ptr": f"*{stream}",
            "branch_ptr": f"*{branch}",
            "bias_ptr": "*fp32",
            "y_ptr": f"*{stream}",
            "row_strides": ("i32", "i32"),
        }
    else:
        own_dbranch = dropout or stream != branch
        kernel, moved = _add_branch_bwd_kernel, SIZES[stream] + own_dbranch * SIZES[branch]
        arguments |= {
            "dy_ptr": f"*{stream}",
            "dbranch_ptr": f"*{branch}" if own_dbranch else None,
            "partial_ptr": "*fp32",
            "dy_stride": "i32",
        }
    elements = float(_TOKENS * _C)
    name = f"{stream} + {branch}" + " dropout" * dropout
    turn = config["BLOCK_N"] * config["BLOCK_C"]
    grid = int(elements) // turn if op == "add_branch_fwd" else None
    return case(
        kernel,
        op,
        config,
        name,
        arguments,
        bytes=elements * moved,
        flops=3 * elements,
        work=Work(elements, turn, grid),
    )


def compile_cases(arch: str) -> list[CompileCase]:
    """Both kernels, with a stream of either dtype."""
    return [
        _case(op, config, *variant)
        for op in ("add_branch_fwd", "add_branch_bwd")
        for _, config in configs(op, arch)
        for variant in _VARIANTS
    ]
