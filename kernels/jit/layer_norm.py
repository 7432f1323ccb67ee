"""LayerNorm forward and backward, alone or fused with the residual addition before it.

C is a constant of the kernels, so that a warp's passes over a tile that lie wholly after C vanish.

Forward: a program owns BLOCK_N rows and holds them whole in registers (BLOCK_C >= C), so a row is
read once. Grid (cdiv(N, BLOCK_N),). With a branch it adds branch and bias, drops out, writes the
new stream and normalises what it has written. Saved for backward: the stream, and its mean and
rstd in fp32, (2, N). Bytes per row of C elements: x, branch, stream and norm, 8C in bf16.

Backward: P programs walk over the blocks of rows, P apart. With n = (s - mean) rstd and g = w dy,

    ds = dstream + rstd (g - mean(g) - n mean(g n)),    dw = sum dy n,    db = sum dy

over the rows, and the bias of the projection that computed the branch gets the sum of the branch's
gradient. Each program keeps its share of those sums in registers; ``rows`` has the second stage.
Without dropout, and in one dtype, the gradients of x and branch are one tensor. Bytes per row:
dstream, dy, stream and ds, 8C in bf16.
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
    row_width,
)


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,
    branch_ptr,
    branch_bias_ptr,
    weight_ptr,
    bias_ptr,
    stream_ptr,
    y_ptr,
    stats_ptr,
    row_strides,
    dropout,
    N,
    eps,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    BLOCK_C: tl.constexpr = row_width(C)
    x_stride, branch_stride = row_strides
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    # rows after N are the last one again: they store what it stores, and no mask is needed
    last = N - 1 - first
    # within a block, offsets are int32: fewer instructions per element
    offs_n = tl.minimum(tl.arange(0, BLOCK_N), last).to(tl.int32)
    cols = tl.arange(0, BLOCK_C)
    # with one row, weights as a tile of it are laid out as it is; otherwise that costs a conversion
    offs_c = cols[None, :] if BLOCK_N == 1 else cols
    mask = cols[None, :] < C
    mask_c = offs_c < C
    offs = offs_n[:, None] * C + cols[None, :]
    x_ptrs = x_ptr + first * x_stride + (offs_n[:, None] * x_stride + cols[None, :])
    s = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        branch_ptr += first * branch_stride
        branch_ptrs = branch_ptr + (offs_n[:, None] * branch_stride + cols[None, :])
        update = tl.load(branch_ptrs, mask=mask, other=0.0).to(tl.float32)
        if branch_bias_ptr is not None:
            update += tl.load(branch_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        if dropout is not None:
            update = dropout_tile(update, dropout, first + offs_n, C, 0)
        stream = (s + update).to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + first * C + offs, stream, mask=mask)
        # backward will see the stream as it was stored: normalise just that
        s = stream.to(tl.float32)
    mean = tl.sum(s, axis=1) / C
    centred = tl.where(mask, s - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    stats_ptr += first
    tl.store(stats_ptr + offs_n, mean)
    tl.store(stats_ptr + N + offs_n, rstd)
    y = centred * rstd[:, None] * tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)
    tl.store(y_ptr + first * C + offs, y, mask=mask)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,
    dstream_ptr,
    stream_ptr,
    weight_ptr,
    stats_ptr,
    dx_ptr,
    dbranch_ptr,
    partial_ptr,
    row_strides,
    dropout,
    N,
    C: tl.constexpr,
    HAS_BRANCH_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    BLOCK_C: tl.constexpr = row_width(C)
    dy_stride, dstream_stride, stream_stride = row_strides
    pid, P = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    w = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_C], tl.float32)
    db = tl.zeros([BLOCK_C], tl.float32)
    dbranch_bias = tl.zeros([BLOCK_C], tl.float32)
    for start in range(pid * BLOCK_N, N, P * BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        mask = mask_n[:, None] & mask_c[None, :]
        dy_ptrs = dy_ptr + offs_n[:, None] * dy_stride + offs_c[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        s_ptrs = stream_ptr + offs_n[:, None] * stream_stride + offs_c[None, :]
        s = tl.load(s_ptrs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + offs_n, mask=mask_n, other=0.0)
        rstd = tl.load(stats_ptr + N + offs_n, mask=mask_n, other=0.0)
        # beyond C, and beyond N, dy is zero: there n may be anything
        n = (s - mean[:, None]) * rstd[:, None]
        dw += tl.sum(dy * n, axis=0)
        db += tl.sum(dy, axis=0)
        g = dy * w
        mean_g, mean_gn = tl.sum(g, axis=1) / C, tl.sum(g * n, axis=1) / C
        ds = (g - mean_g[:, None] - n * mean_gn[:, None]) * rstd[:, None]
        if dstream_ptr is not None:
            dstream_ptrs = dstream_ptr + offs_n[:, None] * dstream_stride + offs_c[None, :]
            ds += tl.load(dstream_ptrs, mask=mask, other=0.0).to(tl.float32)
        offs_out = offs_n[:, None] * C + offs_c[None, :]
        tl.store(dx_ptr + offs_out, ds, mask=mask)
        if dropout is not None:
            ds = dropout_tile(ds, dropout, offs_n, C, 0)
        if dbranch_ptr is not None:
            tl.store(dbranch_ptr + offs_out, ds, mask=mask)
        if HAS_BRANCH_BIAS:
            dbranch_bias += tl.sum(ds, axis=0)
    offs_partial = pid * C + offs_c
    tl.store(partial_ptr + offs_partial, dw, mask=mask_c)
    tl.store(partial_ptr + P * C + offs_partial, db, mask=mask_c)
    if HAS_BRANCH_BIAS:
        tl.store(partial_ptr + 2 * P * C + offs_partial, dbranch_bias, mask=mask_c)


def launch_fwd(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(stream, norm, stats): the stream is empty without a branch, stats (2, N) are fp32."""
    rows, C = as_rows(x), x.shape[-1]
    N = rows.shape[0]
    y = x.new_empty(x.shape, dtype=None if branch is None else branch.dtype)
    stream = x.new_empty(0 if branch is None else x.shape)
    stats = x.new_empty(2, N, dtype=torch.float32)
    if N == 0:
        return stream, y, stats
    branch_rows = None if branch is None else as_rows(branch)
    strides = (rows.stride(0), 0 if branch_rows is None else branch_rows.stride(0))
    shape_class = {"C": C, "dropout": int(seed is not None)}
    config = tuning.pick("layer_norm_fwd", tuning.arch_of(x.device), **shape_class)
    launch_kernel(
        _layer_norm_fwd_kernel,
        (triton.cdiv(N, config["BLOCK_N"]),),
        rows,
        branch_rows,
        branch_bias,
        weight,
        bias,
        stream,
        y,
        stats,
        strides,
        dropout_argument(seed, dropout_p),
        N,
        eps,
        C=C,
        **config.meta(),
    )
    return stream, y, stats


def launch_bwd(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    stats: Tensor,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch, dweight, dbias, dbranch_bias); dbranch is empty where it equals dx."""
    rows, dy_rows, C = as_rows(stream), as_rows(dy), stream.shape[-1]
    dstream_rows = None if dstream is None else as_rows(dstream)
    N = rows.shape[0]
    dx = stream.new_empty(stream.shape)
    own_dbranch = seed is not None or dy.dtype != stream.dtype
    dbranch = dy.new_empty(stream.shape if own_dbranch else 0)
    sums = [torch.empty_like(weight), torch.empty_like(weight if bias is None else bias)]
    if branch_bias is not None:
        sums.append(torch.empty_like(branch_bias))
    shape_class = {"C": C, "dropout": int(seed is not None)}
    config = tuning.pick("layer_norm_bwd", tuning.arch_of(stream.device), **shape_class)
    P = row_programs(config, N, stream.device)
    partial = stream.new_empty(len(sums), P, C, dtype=torch.float32)
    if P > 0:
        dstream_stride = 0 if dstream_rows is None else dstream_rows.stride(0)
        launch_kernel(
            _layer_norm_bwd_kernel,
            (P,),
            dy_rows,
            dstream_rows,
            rows,
            weight,
            stats,
            dx,
            dbranch if own_dbranch else None,
            partial,
            (dy_rows.stride(0), dstream_stride, rows.stride(0)),
            dropout_argument(seed, dropout_p),
            N,
            C=C,
            HAS_BRANCH_BIAS=branch_bias is not None,
            **config.meta(),
        )
    launch_column_sum(partial, sums)
    dbranch_bias = sums[2] if branch_bias is not None else weight.new_empty(0)
    return dx, dbranch, sums[0], sums[1], dbranch_bias


# (stream's dtype, branch's dtype or none, dropout): the residual stream in both of its dtypes
_VARIANTS = (
    ("bf16", "bf16", False),
    ("fp32", "bf16", True),
    ("bf16", None, False),
)
# the widest of each shape class
_WIDTHS = (1024, 4096)
_TOKENS = 65536


def _case(
    op: str, C: int, config: tuning.Config, stream: str, branch: str | None, dropout: bool
) -> CompileCase:
    y = stream if branch is None else branch
    vector = None if branch is None else "*fp32"
    name = f"C{C} {stream}" + f" + {branch}" * (branch is not None) + " dropout" * dropout
    shared = {
        "stream_ptr": f"*{stream}",
        "weight_ptr": "*fp32",
        "stats_ptr": "*fp32",
        "dropout": ("*i64", "fp32") if dropout else None,
        "N": "i32",
        "C": C,
    }
    fused = branch is not None
    if op == "layer_norm_fwd":
        arguments = shared | {
            "x_ptr": f"*{stream}",
            "branch_ptr": branch and f"*{branch}",
            "branch_bias_ptr": vector,
            "bias_ptr": "*fp32",
            "y_ptr": f"*{y}",
            "row_strides": ("i32", "i32"),
            "eps": "fp32",
        }
        kernel, moved = _layer_norm_fwd_kernel, (1 + fused) * (SIZES[stream] + SIZES[y])
    else:
        own_dbranch = fused and (dropout or stream != branch)
        arguments = shared | {
            "dy_ptr": f"*{y}",
            "dstream_ptr": branch and f"*{stream}",
            "dx_ptr": f"*{stream}",
            "dbranch_ptr": f"*{branch}" if own_dbranch else None,
            "partial_ptr": "*fp32",
            "row_strides": ("i32", "i32", "i32"),
            "HAS_BRANCH_BIAS": fused,
        }
        kernel = _layer_norm_bwd_kernel
        moved = (2 + fused) * SIZES[stream] + (1 + own_dbranch) * SIZES[y]
    elements = float(_TOKENS * C)
    grid = _TOKENS // config["BLOCK_N"] if op == "layer_norm_fwd" else None
    return case(
        kernel,
        op,
        config,
        name,
        arguments,
        bytes=elements * moved,
        flops=10 * elements,
        work=Work(elements, config["BLOCK_N"] * C, grid),
    )


def compile_cases(arch: str) -> list[CompileCase]:
    """Both kernels at the widths of each shape class, in the variants that run with it."""
    return [
        _case(op, C, config, stream, branch, dropout)
        for op in ("layer_norm_fwd", "layer_norm_bwd")
        for limits, config in configs(op, arch)
        for C in _WIDTHS
        for stream, branch, dropout in _VARIANTS
        if tuning.rule_of(op, C=C, dropout=int(dropout)).limits == limits
    ]
