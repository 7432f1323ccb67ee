"""The logits of a few rows with the largest of every few of them, and the greedy choice from those.

The head is ``decode_linear``'s product with another end: a program stores its logits and, of every
VOCAB_BLOCK of them, the largest as it was rounded. The choice then reads an eighth of the numbers:
a program owns a row, each of its lanes keeps the first of the largest that it meets, and of the
winning block the logits are read again for the first that is as large. NaN counts as +inf, so that
it is chosen and seen. The same program writes the token to where the next step reads it, counts it,
and keeps it for the host: one launch, whose addresses do not change, so that it is part of a graph.

Grids (cdiv(V, BLOCK_F), cdiv(B, BLOCK_B)) and (B,). Bytes: the weights once per block of rows; of
the choice B V / 2. FLOPs 2 B V C. Nothing is saved.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels import tuning
from fastgpt2.kernels.cases import CompileCase, Work, case, configs
from fastgpt2.kernels.jit.decode_linear import PREFETCH, product_tile, tile_offsets
from fastgpt2.kernels.jit.launch import launch_kernel
from fastgpt2.kernels.reference import VOCAB_BLOCK as _VOCAB_BLOCK
from fastgpt2.kernels.reference import Beside

VOCAB_BLOCK = tl.constexpr(_VOCAB_BLOCK)
# what NaN counts as, and what no logit is less than; they are compared, and nothing else
MOST, LEAST = tl.constexpr(float("inf")), tl.constexpr(float("-inf"))


@triton.jit
def _or_most(x):
    """fp32, NaN as +inf: comparisons with NaN are false, and it would not be seen."""
    x = x.to(tl.float32)
    return tl.where(x == x, x, MOST)


@triton.jit
def _decode_head_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    bias_ptr,
    norm,
    norm_bias_ptr,
    logits_ptr,
    tops_ptr,
    strides,
    shape,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    B, V = shape[0], shape[1]
    offs_b, offs_f = tile_offsets(BLOCK_B, BLOCK_F)
    y = product_tile(
        x_ptr,
        weight_ptr,
        scales_ptr,
        bias_ptr,
        norm,
        norm_bias_ptr,
        (offs_b, offs_f),
        strides,
        shape,
        BLOCK_B,
        BLOCK_F,
        BLOCK_C,
    )
    mask_b, mask_f = offs_b < B, offs_f < V
    # as the choice will read them
    y = y.to(logits_ptr.dtype.element_ty)
    logits_ptrs = logits_ptr + offs_b[:, None] * V + offs_f[None, :]
    tl.store(logits_ptrs, y, mask=mask_b[:, None] & mask_f[None, :])
    y = tl.where(mask_f[None, :], _or_most(y), LEAST)
    BLOCKS: tl.constexpr = BLOCK_F // VOCAB_BLOCK
    tops = tl.max(tl.reshape(y, [BLOCK_B, BLOCKS, VOCAB_BLOCK]), 2)
    n = tl.cdiv(V, VOCAB_BLOCK)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    mask = mask_b[:, None] & (offs_n < n)[None, :]
    tl.store(tops_ptr + offs_b[:, None] * n + offs_n[None, :], tops, mask=mask)


@triton.jit
def _decode_greedy_kernel(
    logits_ptr,
    tops_ptr,
    tokens_ptr,
    lengths_ptr,
    steps_ptr,
    recent_ptr,
    strides,
    shape,
    BLOCK_N: tl.constexpr,
):
    V, recent_steps = shape
    b = tl.program_id(0).to(tl.int64)
    logits_ptr += b * strides[0]
    step = tl.load(steps_ptr + b)
    if step >= 0:
        length = tl.load(lengths_ptr + b)
        # all threads have read them before one of them writes
        tl.debug_barrier()
        if tops_ptr is None:
            values_ptr, n = logits_ptr, V
        else:
            n = tl.cdiv(V, VOCAB_BLOCK)
            values_ptr = tops_ptr + b * n
        offs_n = tl.arange(0, BLOCK_N)
        top = tl.full([BLOCK_N], LEAST, tl.float32)
        place = tl.zeros([BLOCK_N], tl.int32)
        for first in tl.range(0, n, BLOCK_N, num_stages=PREFETCH):
            at = first + offs_n
            value = _or_most(tl.load(values_ptr + at, mask=at < n, other=LEAST))
            place = tl.where(value > top, at, place)
            top = tl.maximum(top, value)
        best = tl.max(top, 0)
        token = tl.min(tl.where(top == best, place, n), 0)
        if tops_ptr is not None:
            at = token * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)
            value = _or_most(tl.load(logits_ptr + at, mask=at < V, other=LEAST))
            token = tl.min(tl.where(value == best, at, V), 0)
        tl.store(tokens_ptr + b, token)
        tl.store(lengths_ptr + b, length + 1)
        tl.store(steps_ptr + b, step + 1)
        fits = step < recent_steps
        recent_ptr += step * strides[2] + b
        tl.store(recent_ptr, token, mask=fits)
        tl.store(recent_ptr + strides[1], best, mask=fits)


def launch(
    x: Tensor, weight: Tensor, beside: Beside, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Logits (B, V) in ``dtype`` and the largest of every VOCAB_BLOCK of them, in fp32."""
    (B, C), V = x.shape, weight.shape[0]
    logits = x.new_empty(B, V, dtype=dtype)
    tops = x.new_empty(B, triton.cdiv(V, _VOCAB_BLOCK), dtype=torch.float32)
    if logits.numel() == 0:
        return logits, tops
    arch = tuning.arch_of(x.device)
    config = tuning.pick("decode_head", arch, rows=B)
    launch_kernel(
        _decode_head_kernel,
        (triton.cdiv(V, config["BLOCK_F"]), triton.cdiv(B, config["BLOCK_B"])),
        x,
        weight,
        beside.scales,
        beside.bias,
        None if beside.norm_weight is None else (beside.norm_weight, eps),
        beside.norm_bias,
        logits,
        tops,
        (x.stride(0), weight.stride(0)),
        (B, V, C),
        **config.meta(),
    )
    return logits, tops


def launch_greedy(
    logits: Tensor,
    tops: Tensor | None,
    tokens: Tensor,
    lengths: Tensor,
    steps: Tensor,
    recent: Tensor,
) -> None:
    """The largest of each row's logits (B, V) into tokens (B,) and recent (2, steps, B)."""
    (B, V), arch = logits.shape, tuning.arch_of(logits.device)
    if B == 0:
        return
    config = tuning.pick("decode_greedy", arch)
    launch_kernel(
        _decode_greedy_kernel,
        (B,),
        logits,
        tops,
        tokens,
        lengths,
        steps,
        recent,
        (logits.stride(0), *recent.stride()[:2]),
        (V, recent.shape[1]),
        **config.meta(),
    )


# GPT-2's vocabulary and width
_V, _C = 50257, 768


def _case(config: tuning.Config, dtype: str) -> CompileCase:
    B = config["BLOCK_B"]
    arguments = {
        **dict.fromkeys(("x_ptr", "norm_bias_ptr", "logits_ptr"), "*bf16"),
        "weight_ptr": "*i8" if dtype == "int8" else "*bf16",
        "scales_ptr": "*fp32" if dtype == "int8" else None,
        "bias_ptr": None,
        "norm": ("*bf16", "fp32"),
        "tops_ptr": "*fp32",
        "strides": ("i32", "i32"),
        # one row: Triton specialises on it
        "shape": ("constexpr" if B == 1 else "i32", "i32", "i32"),
    }
    return case(
        _decode_head_kernel,
        "decode_head",
        config,
        dtype,
        arguments,
        bytes=float(_V * _C * (1 if dtype == "int8" else 2)),
        flops=2.0 * B * _V * _C,
        # per weight: a product with the same column of each row
        work=Work(float(_V * _C), config["BLOCK_F"] * config["BLOCK_C"], _V // config["BLOCK_F"]),
        odd=("shape.0", "shape.1", "norm.1"),
    )


def _greedy_case(config: tuning.Config, *, whole: bool) -> CompileCase:
    # all logits of many rows, which the library's product has made, or the largest of one row
    rows, read = (64, _V) if whole else (1, _V // _VOCAB_BLOCK)
    arguments = {
        "logits_ptr": "*bf16",
        "tops_ptr": None if whole else "*fp32",
        **dict.fromkeys(("tokens_ptr", "lengths_ptr", "steps_ptr"), "*i64"),
        "recent_ptr": "*fp64",
        "strides": ("i32", "i32", "i32"),
        "shape": ("i32", "i32"),
    }
    return case(
        _decode_greedy_kernel,
        "decode_greedy",
        config,
        "logits bf16" if whole else "largest fp32",
        arguments,
        bytes=float(rows * read * (2 if whole else 4)),
        flops=0.0,
        work=Work(float(rows * read), config["BLOCK_N"], rows),
        odd=("strides.0", "strides.1", "strides.2", "shape.0", "shape.1"),
    )


def compile_cases(arch: str) -> list[CompileCase]:
    """GPT-2's head with weights in int8 or bf16; the choice from few numbers and from many."""
    return [
        *(
            _case(config, dtype)
            for _, config in configs("decode_head", arch)
            for dtype in ("bf16", "int8")
        ),
        *(
            _greedy_case(config, whole=whole)
            for _, config in configs("decode_greedy", arch)
            for whole in (False, True)
        ),
    ]
