"""Cross-entropy of logits, forward and backward: one program per row, grid (N,).

A row of GPT-2's logits, 100 KB in bf16, does not fit in registers, so a program walks over it in
tiles of BLOCK_V. A lane takes VECTOR adjacent logits of each tile, 16 bytes, and keeps a running
maximum and a running sum of exponentials of its own, so that no thread waits for another: the lanes
are merged once, after the loop. Only the last tile, peeled off, has a mask.

With m = max z, l = log sum exp(z - m), lse = m + l, s the label smoothing, p = exp(z - m - l),

    loss = l - (1 - s) (z_y - m) - s (mean(z) - m) + z_loss lse^2
    dz   = p (1 + 2 z_loss lse) - (1 - s) [v = y] - s / V

where columns after the vocabulary and rows whose target is ignored get zeros. m and l stay apart:
beside a large m, the last bits of l, and with them p's, would be lost. Exponentials are powers of
two, an instruction of every GPU, and l is kept as l log2(e). Two ways to use it:

- alone (``launch_fwd``, ``launch_bwd``): saved are the logits and (m, l log2(e)), (2, N) in fp32;
  the gradient is written once, with the upstream gradient in it. Bytes per element, bf16: 2 and 4;
- in one pass over logits that the caller owns (``launch_in_place``): the program that has just
  computed m and l reads its row again, now from cache, and writes the gradient over it. 4 bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels import tuning
from fastgpt2.kernels.cases import SIZES, CompileCase, Work, case, configs
from fastgpt2.kernels.jit.launch import launch_kernel
from fastgpt2.kernels.jit.primitives import LN2, LOG2E

# ignore_index, vocab_size, label_smoothing, z_loss
Options = tuple[int, int, float, float]

# maximum of lanes that have seen nothing yet: finite, so that no difference is -inf minus -inf
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _add_tile(z, m, s):
    """(m, s): the lanes' running maximum and sum of exponentials, with one more tile."""
    m_new = tl.maximum(m, tl.max(z, axis=1))
    # the difference first: it is exact near the maximum, however far from zero the logits are
    s = s * tl.exp2((m - m_new) * LOG2E) + tl.sum(tl.exp2((z - m_new[:, None]) * LOG2E), axis=1)
    return m_new, s


@triton.jit
def _row_statistics(
    row_ptr, kept, V, V_padded, SMOOTHED: tl.constexpr, VECTOR: tl.constexpr, BLOCK_V: tl.constexpr
):
    """(max, log2 of the sum of exponentials, sum) of a row's first V logits.

    The exponentials are those of the distance to the maximum; the sum is 0 unless SMOOTHED.
    """
    LANES: tl.constexpr = BLOCK_V // VECTOR
    m = tl.full([LANES], _LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    total = tl.zeros([LANES], tl.float32)
    offs = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    # nothing is read of an ignored row; only the last tile needs a mask
    whole = tl.where(kept, V // BLOCK_V * BLOCK_V, 0)
    for start in range(0, whole, BLOCK_V):
        z = tl.load(row_ptr + start + offs).to(tl.float32)
        if SMOOTHED:
            total += tl.sum(z, axis=1)
        m, s = _add_tile(z, m, s)
    # the load's mask is that of the row in memory, a multiple of 16 columns, and not the
    # vocabulary's odd number: only so is the load a vector
    offs += whole
    in_row = offs < tl.where(kept, V_padded, 0)
    z = tl.load(row_ptr + offs, mask=in_row, other=0.0).to(tl.float32)
    if SMOOTHED:
        total += tl.sum(tl.where(offs < V, z, 0.0), axis=1)
    # a lane that sees padding only counts it, but its weight in the end is exp(-huge) = 0
    m, s = _add_tile(tl.where(offs < V, z, _LOWEST), m, s)
    row_max = tl.max(m, axis=0)
    log2_sum = tl.log2(tl.sum(s * tl.exp2((m - row_max) * LOG2E), axis=0))
    return row_max, log2_sum, tl.sum(total, axis=0)


@triton.jit
def _gradient_tile(z, offs, target, statistics, factors):
    """p_scale p - base, less the target's share, of one tile of logits."""
    row_max, log2_sum = statistics
    p_scale, base, share = factors
    dz = tl.exp2((z - row_max) * LOG2E - log2_sum) * p_scale - base
    return tl.where(offs == target, dz - share, dz)


@triton.jit
def _write_gradient(
    row_ptr, drow_ptr, target, kept, statistics, scale, columns, terms, BLOCK_V: tl.constexpr
):
    """Write ``scale`` times the gradient of one row's loss, zeros if the row is not kept."""
    V, V_padded = columns
    _, smoothing, z_loss = terms
    lse = statistics[0] + statistics[1] * LN2
    p_scale = scale * (1.0 + 2.0 * z_loss * lse)
    factors = (p_scale, scale * smoothing / V, scale * (1.0 - smoothing))
    whole = V // BLOCK_V * BLOCK_V
    offs = tl.arange(0, BLOCK_V)
    if kept:
        # start at the end: what was read last is likeliest to be in cache
        last = whole + offs
        z = tl.load(row_ptr + last, mask=last < V_padded, other=0.0).to(tl.float32)
        dz = _gradient_tile(z, last, target, statistics, factors)
        tl.store(drow_ptr + last, tl.where(last < V, dz, 0.0), mask=last < V_padded)
        for done in range(0, whole, BLOCK_V):
            start = whole - BLOCK_V - done
            z = tl.load(row_ptr + start + offs).to(tl.float32)
            dz = _gradient_tile(z, offs, target - start, statistics, factors)
            tl.store(drow_ptr + start + offs, dz)
    # zeros for an ignored row, or for more padding than the last tile holds
    for start in range(tl.where(kept, whole + BLOCK_V, 0), V_padded, BLOCK_V):
        zeros = tl.zeros([BLOCK_V], tl.float32)
        tl.store(drow_ptr + start + offs, zeros, mask=offs < V_padded - start)


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr,
    targets_ptr,
    loss_ptr,
    stats_ptr,
    dlogits_ptr,
    row_strides,
    columns,
    terms,
    SMOOTHED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    V, V_padded = columns
    ignore_index, smoothing, z_loss = terms
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_strides[0]
    target = tl.load(targets_ptr + row)
    kept = target != ignore_index
    # a target that is not a token id gives NaN, and nothing outside the row is read. In place, this
    # load must precede the first write: the statistics' reductions over all warps lie between them
    valid = (target >= 0) & (target < V)
    picked = tl.load(row_ptr + target, mask=valid, other=float("nan")).to(tl.float32)
    m, log2_sum, total = _row_statistics(row_ptr, kept, V, V_padded, SMOOTHED, VECTOR, BLOCK_V)
    log_sum = log2_sum * LN2
    lse = m + log_sum
    loss = log_sum - (1.0 - smoothing) * (picked - m) + z_loss * lse * lse
    if SMOOTHED:
        loss -= smoothing * (total / V - m)
    tl.store(loss_ptr + row, tl.where(kept, loss, 0.0))
    if stats_ptr is not None:
        tl.store(stats_ptr + row, m)
        tl.store(stats_ptr + tl.num_programs(0) + row, log2_sum)
    if dlogits_ptr is not None:
        drow_ptr = dlogits_ptr + row * row_strides[1]
        stats, place = (m, log2_sum), tl.where(valid, target, -1).to(tl.int32)
        _write_gradient(row_ptr, drow_ptr, place, kept, stats, 1.0, columns, terms, BLOCK_V)


@triton.jit
def _cross_entropy_bwd_kernel(
    logits_ptr,
    targets_ptr,
    stats_ptr,
    scale_ptr,
    dlogits_ptr,
    row_strides,
    columns,
    terms,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    _write_gradient(
        logits_ptr + row * row_strides[0],
        dlogits_ptr + row * row_strides[1],
        # comparing 32 bits per logit costs half of comparing 64
        tl.where((target >= 0) & (target < columns[0]), target, -1).to(tl.int32),
        target != terms[0],
        (tl.load(stats_ptr + row), tl.load(stats_ptr + tl.num_programs(0) + row)),
        tl.load(scale_ptr),
        columns,
        terms,
        BLOCK_V,
    )


def _launch_fwd(
    logits: Tensor,
    targets: Tensor,
    stats: Tensor | None,
    dlogits: Tensor | None,
    options: Options,
) -> Tensor:
    N, V_padded = logits.shape
    ignore_index, vocab_size, smoothing, z_loss = options
    losses = logits.new_empty(N, dtype=torch.float32)
    if N > 0:
        config = tuning.pick("cross_entropy_fwd", tuning.arch_of(logits.device))
        launch_kernel(
            _cross_entropy_fwd_kernel,
            (N,),
            logits,
            targets,
            losses,
            stats,
            dlogits,
            (logits.stride(0), 0 if dlogits is None else dlogits.stride(0)),
            (vocab_size, V_padded),
            (ignore_index, smoothing, z_loss),
            SMOOTHED=smoothing > 0,
            VECTOR=16 // logits.element_size(),
            **config.meta(),
        )
    return losses


def launch_fwd(logits: Tensor, targets: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(losses, stats): (N,), zero for ignored rows, and (2, N), both fp32."""
    stats = logits.new_empty(2, logits.shape[0], dtype=torch.float32)
    return _launch_fwd(logits, targets, stats, None, options), stats


def launch_in_place(
    logits: Tensor, targets: Tensor, options: Options, *, with_grad: bool
) -> Tensor:
    """Losses (N,); with grad, the logits are overwritten with the gradient of their sum."""
    return _launch_fwd(logits, targets, None, logits if with_grad else None, options)


def launch_bwd(
    logits: Tensor, targets: Tensor, stats: Tensor, scale: Tensor, options: Options
) -> Tensor:
    """``scale``, an fp32 scalar tensor, times the gradient of the sum of the rows' losses."""
    N, V_padded = logits.shape
    ignore_index, vocab_size, smoothing, z_loss = options
    dlogits = logits.new_empty(logits.shape)
    if N > 0:
        config = tuning.pick("cross_entropy_bwd", tuning.arch_of(logits.device))
        launch_kernel(
            _cross_entropy_bwd_kernel,
            (N,),
            logits,
            targets,
            stats,
            scale,
            dlogits,
            (logits.stride(0), dlogits.stride(0)),
            (vocab_size, V_padded),
            (ignore_index, smoothing, z_loss),
            **config.meta(),
        )
    return dlogits


# a micro-batch of 16 x 1024 tokens over GPT-2's vocabulary, padded to a multiple of 128
_TOKENS, _COLUMNS = 16384, 50304


def _case(op: str, config: tuning.Config, dtype: str, variant: str) -> CompileCase:
    shared = {
        "logits_ptr": f"*{dtype}",
        "targets_ptr": "*i64",
        "dlogits_ptr": None if variant == "loss" else f"*{dtype}",
        "row_strides": ("i32", "i32"),
        "columns": ("i32", "i32"),
        "terms": ("i32", "fp32", "fp32"),
    }
    if op == "cross_entropy_fwd":
        kernel = _cross_entropy_fwd_kernel
        own = {
            "loss_ptr": "*fp32",
            "stats_ptr": "*fp32" if variant == "loss" else None,
            "VECTOR": 16 // SIZES[dtype],
            "SMOOTHED": variant == "smoothed, in place",
        }
    else:
        kernel, own = _cross_entropy_bwd_kernel, {"stats_ptr": "*fp32", "scale_ptr": "*fp32"}
    elements = float(_TOKENS * _COLUMNS)
    return case(
        kernel,
        op,
        config,
        f"{dtype} {variant}",
        shared | own,
        bytes=elements * SIZES[dtype] * (1 if variant == "loss" else 2),
        flops=8 * elements,
        work=Work(elements, config["BLOCK_V"], _TOKENS),
        odd=("columns.0", "terms.0"),
    )


def compile_cases(arch: str) -> list[CompileCase]:
    """Loss alone, loss and gradient in one pass, and the gradient from saved statistics."""
    variants = {
        "cross_entropy_fwd": ("loss", "in place", "smoothed, in place"),
        "cross_entropy_bwd": ("gradient",),
    }
    return [
        _case(op, config, dtype, variant)
        for op, named in variants.items()
        for _, config in configs(op, arch)
        for dtype in ("bf16", "fp32")
        for variant in named
    ]
