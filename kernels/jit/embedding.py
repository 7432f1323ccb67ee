"""Token plus position embedding, forward and backward.

Forward: a program gathers BLOCK_N whole rows of both tables, adds them in fp32, drops out. Grid
(cdiv(N, BLOCK_N),) for N = B T tokens. An id outside its table gives NaN instead of a stray read.
Bytes per token of C numbers in bf16: 6C, of which 2C and more come from cache.

Backward is a segment sum, without atomics: the tokens are sorted by id (stably, so that equal ids
keep their order), and one program adds the rows of one id in one block of columns, in fp32, to what
the table's gradient holds there: zeros, or the gradient of a tied head. Programs of ids that do not
occur end at once. Grid (rows of the table * cdiv(C, BLOCK_C),). Positions 0, 1, 2, ... need no
sort: position t has the rows t, T + t, 2T + t, ... Bytes: 2 N C, and 4 C per id that occurs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels import tuning
from fastgpt2.kernels.cases import SIZES, CompileCase, Work, case, configs
from fastgpt2.kernels.jit.launch import launch_kernel
from fastgpt2.kernels.jit.rows import as_rows, dropout_argument, dropout_tile, row_width


@triton.jit
def _gather(table_ptr, ids, row_stride, n_rows, mask, offs_c):
    known = (ids >= 0) & (ids < n_rows)
    ptrs = table_ptr + ids[:, None] * row_stride + offs_c[None, :]
    return tl.load(ptrs, mask=mask & known[:, None], other=float("nan")).to(tl.float32)


@triton.jit
def _embedding_fwd_kernel(
    idx_ptr,
    positions_ptr,
    wte_ptr,
    wpe_ptr,
    x_ptr,
    row_strides,
    table_rows,
    shape,
    dropout,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    N, T, C = shape
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_c < C)[None, :]
    ids = tl.load(idx_ptr + offs_n, mask=mask_n, other=0).to(tl.int64)
    if positions_ptr is None:
        positions = offs_n % T
    else:
        positions = tl.load(positions_ptr + offs_n, mask=mask_n, other=0).to(tl.int64)
    x = _gather(wte_ptr, ids, row_strides[0], table_rows[0], mask, offs_c)
    x += _gather(wpe_ptr, positions, row_strides[1], table_rows[1], mask, offs_c)
    offs_out = offs_n[:, None] * C + offs_c[None, :]
    if dropout is not None:
        x = dropout_tile(x, dropout, offs_n, C, 0)
    tl.store(x_ptr + offs_out, x, mask=mask)


@triton.jit
def _segment_sum_kernel(
    dx_ptr,
    order_ptr,
    bounds_ptr,
    dtable_ptr,
    dx_stride,
    C,
    dropout,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid, column_blocks = tl.program_id(0).to(tl.int64), tl.cdiv(C, BLOCK_C)
    row = pid // column_blocks
    offs_c = pid % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    start, end = tl.load(bounds_ptr + row), tl.load(bounds_ptr + row + 1)
    if start < end:
        dtable_ptrs = dtable_ptr + row * C + offs_c
        total = tl.load(dtable_ptrs, mask=mask_c, other=0.0).to(tl.float32)
        for first in range(start, end, BLOCK_N):
            offs = first + tl.arange(0, BLOCK_N)
            tokens = tl.load(order_ptr + offs, mask=offs < end, other=0)
            mask = (offs < end)[:, None] & mask_c[None, :]
            ptrs = dx_ptr + tokens[:, None] * dx_stride + offs_c[None, :]
            dx = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
            if dropout is not None:
                dx = dropout_tile(dx, dropout, tokens, C, pid % column_blocks * BLOCK_C)
            total += tl.sum(dx, axis=0)
        tl.store(dtable_ptrs, total, mask=mask_c)


def launch_fwd(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor,
    positions: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,
) -> Tensor:
    """x (B, T, C) in ``dtype``; idx and positions (B, T) are contiguous, None for 0 ... T-1."""
    (B, T), C = idx.shape, wte.shape[1]
    x = wte.new_empty(B, T, C, dtype=dtype)
    if x.numel() > 0:
        config = tuning.pick("embedding_fwd", tuning.arch_of(wte.device))
        launch_kernel(
            _embedding_fwd_kernel,
            (triton.cdiv(B * T, config["BLOCK_N"]),),
            idx,
            positions,
            wte,
            wpe,
            x,
            (wte.stride(0), wpe.stride(0)),
            (wte.shape[0], wpe.shape[0]),
            (B * T, T, C),
            dropout_argument(seed, dropout_p),
            BLOCK_C=row_width(C),
            **config.meta(),
        )
    return x


def sorted_segments(ids: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """(order, bounds): ``order[bounds[r]:bounds[r + 1]]`` are the tokens of id r, in order."""
    ids, order = torch.sort(ids.flatten(), stable=True)
    rows = torch.arange(n_rows + 1, dtype=ids.dtype, device=ids.device)
    return order, torch.searchsorted(ids, rows)


def counting_segments(B: int, T: int, n_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``sorted_segments`` of the positions 0 .. T-1 in each of B rows."""
    order = torch.arange(B * T, device=device).view(B, T).t().reshape(-1)
    return order, torch.arange(n_rows + 1, device=device).clamp_(max=T) * B


def launch_bwd(
    dx: Tensor,
    segments: tuple[Tensor, Tensor],
    seed: Tensor | None,
    dropout_p: float,
    dtable: Tensor,
) -> None:
    """Add the gradient of a table (n_rows, C), from that of x; ``segments`` are its ids, sorted."""
    order, bounds = segments
    n_rows, C = dtable.shape
    rows = as_rows(dx)
    config = tuning.pick("segment_sum", tuning.arch_of(dx.device))
    grid = (n_rows * triton.cdiv(C, config["BLOCK_C"]),)
    launch_kernel(
        _segment_sum_kernel,
        grid,
        rows,
        order,
        bounds,
        dtable,
        rows.stride(0),
        C,
        dropout_argument(seed, dropout_p),
        **config.meta(),
    )


# 64 x 1024 tokens of GPT-2
_TOKENS, _V, _C = 65536, 50304, 768


def compile_cases(arch: str) -> list[CompileCase]:
    """Both kernels with an fp32 and a bf16 stream, the latter with given positions and dropout."""
    cases = []
    for dtype in ("fp32", "bf16"):
        extras = dtype == "bf16"
        dropout = ("*i64", "fp32") if extras else None
        variant = dtype + " positions dropout" * extras
        fwd = {
            "idx_ptr": "*i64",
            "positions_ptr": "*i64" if extras else None,
            "wte_ptr": f"*{dtype}",
            "wpe_ptr": f"*{dtype}",
            "x_ptr": f"*{dtype}",
            "row_strides": ("i32", "i32"),
            "table_rows": ("i32", "i32"),
            "shape": ("i32", "i32", "i32"),
            "dropout": dropout,
            "BLOCK_C": triton.next_power_of_2(_C),
        }
        bwd = {
            "dx_ptr": f"*{dtype}",
            "order_ptr": "*i64",
            "bounds_ptr": "*i64",
            "dtable_ptr": f"*{dtype}",
            "dx_stride": "i32",
            "C": "i32",
            "dropout": dropout,
        }
        row_bytes = float(_C * SIZES[dtype])
        for op, kernel, arguments, rows in (
            ("embedding_fwd", _embedding_fwd_kernel, fwd, 2 * _TOKENS),
            ("segment_sum", _segment_sum_kernel, bwd, _TOKENS + 2 * _V),
        ):
            for _, config in configs(op, arch):
                width, grid = (_C, _TOKENS // config["BLOCK_N"])
                if op == "segment_sum":
                    width, grid = config["BLOCK_C"], _V * triton.cdiv(_C, config["BLOCK_C"])
                cases.append(
                    case(
                        kernel,
                        op,
                        config,
                        variant,
                        arguments,
                        bytes=rows * row_bytes,
                        flops=_TOKENS * _C,
                        work=Work(_TOKENS * _C, config["BLOCK_N"] * width, grid),
                    )
                )
    return cases
