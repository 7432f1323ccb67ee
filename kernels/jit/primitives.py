"""Small pieces that kernels of different ops share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels import tuning
from fastgpt2.kernels.gpus import has_tf32

# softmax in base 2: exp2 is one instruction, and log2(e) goes into a factor that is there anyway
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# the score of a hidden key, and where a running maximum starts: below any score but so far above
# HIDDEN that a tile of hidden keys alone gives exp2(HIDDEN - LOWEST) = 0, not exp2(0) = 1
HIDDEN = tl.constexpr(-3.0e38)
LOWEST = tl.constexpr(-1.0e30)


def allows_tf32(x: Tensor) -> bool:
    """Whether products of fp32 take TF32: ``torch.set_float32_matmul_precision`` and the GPU allow.

    Triton does not compile a product in TF32 for a GPU that has none.
    """
    # the same answer for every other dtype, so that a kernel compiles once
    asked = x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return asked and has_tf32(tuning.arch_of(x.device))


@triton.jit
def keep_words(dropout, rows, width, groups):
    """Where dropout keeps each fourth of a tile: four [rows, groups] for columns 4 group + 0 ... 3.

    ``dropout`` is (seed_ptr, p); rows are int64 and global, ``width`` is that of a whole row.
    One Philox counter gives four words, and none is thrown away.
    """
    seed_ptr, p = dropout
    counters = rows[:, None] * tl.cdiv(width, 4) + groups[None, :]
    a, b, c, d = tl.randint4x(tl.load(seed_ptr), counters)
    # as a tensor: the interpreter hands the numbers in a tuple on as Python's
    share = tl.full([1, 1], p, tl.float32) * 4294967296.0
    threshold = tl.minimum(share.to(tl.int64), 4294967295).to(tl.uint32)
    return a >= threshold, b >= threshold, c >= threshold, d >= threshold


@triton.jit
def load_tile(ptr, rows, row_stride, n_rows, D: tl.constexpr, EVEN: tl.constexpr):
    """[rows, D padded] of an (n_rows, D) matrix, zero beyond D; EVEN: no row is beyond n_rows."""
    # tl.dot takes powers of two from 16 on
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(D))
    cols = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows[:, None] * row_stride + cols[None, :]
    if EVEN and D == BLOCK_D:
        return tl.load(ptrs)
    elif EVEN:
        return tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(ptrs, mask=(rows < n_rows)[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, x, rows, row_stride, n_rows, D: tl.constexpr):
    """Write what of a [rows, D padded] tile lies within (n_rows, D), in the matrix's dtype."""
    cols = tl.arange(0, x.shape[1])
    ptrs = ptr + rows[:, None] * row_stride + cols[None, :]
    mask = (rows < n_rows)[:, None] & (cols < D)[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)
