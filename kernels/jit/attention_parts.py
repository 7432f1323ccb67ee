"""What attention's forward and backward kernels share: grid, masks, launches, compile cases.

All three kernels take, after their tensors, the same arguments: the two masks, each a tensor or
None; dropout, (bits, p) or None; the strides (batch, token) of qkv; the shape (H, T); and the
scale. All run on a grid (H, blocks, B), which the hardware walks through from the left: the heads
of one sequence together, so that its k and v stay in the L2 cache, and the longest blocks first, so
that the short ones fill the gaps at the end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels import tuning
from fastgpt2.kernels.cases import SIZES, CompileCase, Work, case, configs
from fastgpt2.kernels.gpus import has_tf32
from fastgpt2.kernels.jit.launch import launch_kernel
from fastgpt2.kernels.jit.primitives import allows_tf32


@triton.jit
def my_block(BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(b, h, first token) of this program's block."""
    h, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if LAST_FIRST:
        block = tl.num_programs(1) - 1 - block
    # a token's number fits in 32 bits, and masks compare many of them
    return tl.program_id(2).to(tl.int64), h, (block * BLOCK).to(tl.int32)


@triton.jit
def load_ids(segment_ptr, b, tokens, T):
    """The segment of each token; one and the same where there are no segments."""
    if segment_ptr is None:
        return tl.zeros_like(tokens)
    else:
        return tl.load(segment_ptr + b * T + tokens, mask=tokens < T, other=0)


@triton.jit
def load_key_range(range_ptr, b, T):
    """[start, end): the keys of batch row b that may be seen at all."""
    if range_ptr is None:
        return 0, T
    else:
        start, end = tl.load(range_ptr + 2 * b), tl.load(range_ptr + 2 * b + 1)
        return tl.maximum(start, 0).to(tl.int32), tl.minimum(end, T).to(tl.int32)


@triton.jit
def hide(x, value, q, k, crosses, ids_q, ids_k, key_range, MASKED: tl.constexpr):
    """``x`` with ``value`` where query q does not see key k; the shapes broadcast.

    Without masks only a tile that the diagonal ``crosses`` needs a look: a branch that the whole
    program takes or leaves.
    """
    if MASKED:
        start, end = key_range
        x = tl.where((k <= q) & (ids_q == ids_k) & (k >= start) & (k < end), x, value)
    elif crosses:
        x = tl.where(k <= q, x, value)
    return x


def launch(
    kernel: Any,
    op: str,
    block: str,
    tensors: tuple[Any, ...],
    qkv: Tensor,
    bits: Tensor | None,
    segment_ids: Tensor | None,
    key_range: Tensor | None,
    n_head: int,
    dropout_p: float,
    scale: float,
) -> None:
    """Run ``kernel`` over every head and every ``block`` of its tokens, as the table says."""
    B, T, three_C = qkv.shape
    D = three_C // (3 * n_head)
    config = tuning.pick(
        op,
        tuning.arch_of(qkv.device),
        D=D,
        bytes=qkv.element_size(),
        dropout=int(bits is not None),
        masked=int(segment_ids is not None or key_range is not None),
    )
    launch_kernel(
        kernel,
        (n_head, triton.cdiv(T, config[block]), B),
        *tensors,
        None if segment_ids is None else segment_ids.contiguous(),
        None if key_range is None else key_range.contiguous(),
        # p = 0 has a separate kernel, without the mask
        None if bits is None else (bits, dropout_p),
        (qkv.stride(0), qkv.stride(1)),
        (n_head, T),
        scale,
        D=D,
        EVEN=T % max(config["BLOCK_M"], config["BLOCK_N"]) == 0,
        TF32=allows_tf32(qkv),
        **config.meta(),
    )


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for besides its tiles; ``even``: T is a multiple of the tile."""

    dtype: str
    D: int
    masked: bool = False
    dropout: bool = False
    even: bool = True
    tf32: bool = False

    def __str__(self) -> str:
        words = (
            ("masks",) * self.masked + ("dropout",) * self.dropout + ("ragged",) * (not self.even)
        )
        number = "tf32" if self.tf32 else self.dtype
        return " ".join((f"D{self.D}", number, *words))


def _variants(limits: Mapping[str, int], arch: str) -> list[Variant]:
    """The hardest launches that a rule of the table stands for, and the usual ones."""

    def full(dtype: str, D: int, tf32: bool = False) -> Variant:
        return Variant(dtype, D, masked=True, dropout=True, even=False, tf32=tf32)

    if "bytes" not in limits:
        exact = [Variant("fp32", 64), full("fp32", 128)]
        return [*exact, full("fp32", 128, tf32=True)] if has_tf32(arch) else exact
    if "masked" in limits:
        plain = [Variant("bf16", 64), Variant("bf16", 64, even=False)]
        dropout = [Variant("bf16", 64, dropout=True)]
        return {0: plain, 1: dropout}.get(limits.get("dropout", 2), plain + dropout)
    if limits["D"] == 64:
        return [full("bf16", 64)]
    wide = [Variant("bf16", 128), Variant("bf16", 80, even=False)]
    masked = [Variant("bf16", 128, masked=True, even=False)]
    dropout = [full("bf16", 128)]
    return {0: wide + masked, 1: dropout}.get(limits.get("dropout", 2), wide + dropout)


def attention_cases(
    kernel: Any,
    op: str,
    arch: str,
    tensors: dict[str, Any],
    products: int,
    passes: int,
    block: str,
) -> list[CompileCase]:
    """Compile cases of one kernel: every config with every variant that its rule stands for.

    Args:
        kernel: the ``@triton.jit`` function.
        op: the kernel's name in the table.
        arch: the architecture.
        tensors: types of its own arguments, with ``{}`` in place of the dtype of qkv.
        products: matrix products in its loop.
        passes: tensors (B, T, C) that it reads or writes.
        block: the block size that the grid divides the tokens by.
    """
    return [
        _case(kernel, op, config, variant, tensors, products, passes, block)
        for limits, config in configs(op, arch)
        for variant in _variants(limits, arch)
    ]


def _typed(kind: str | tuple[str, ...], dtype: str) -> str | tuple[str, ...]:
    if isinstance(kind, tuple):
        return tuple(part.format(dtype) for part in kind)
    return kind.format(dtype)


def _case(
    kernel: Any,
    op: str,
    config: tuning.Config,
    variant: Variant,
    tensors: dict[str, Any],
    products: int,
    passes: int,
    block: str,
) -> CompileCase:
    B, T, C = 16, 1024, 768
    heads = B * C // variant.D
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    # causal: half of all tiles, and those that the diagonal crosses in full
    crossing = heads * T / min(block_m, block_n)
    tiles = heads * (T * T / (block_m * block_n) - T / max(block_m, block_n)) / 2 + crossing
    own = {name: _typed(kind, variant.dtype) for name, kind in tensors.items()}
    shared = {
        "segment_ptr": "*i64" if variant.masked else None,
        "range_ptr": "*i64" if variant.masked else None,
        "dropout": ("*i32", "fp32") if variant.dropout else None,
        "strides": ("i32", "i32"),
        "shape": ("i32", "i32"),
        "scale": "fp32",
        "D": variant.D,
        "EVEN": variant.even,
        "TF32": variant.tf32,
    }
    return case(
        kernel,
        op,
        config,
        str(variant),
        own | shared,
        flops=float(products * B * T * T * C),
        bytes=float(passes * B * T * C * SIZES[variant.dtype]),
        # the FMA units do fp32 unless tf32 is allowed
        wants_mma=variant.dtype != "fp32" or variant.tf32,
        work=Work(tiles, grid=int(heads * T / config[block]), unit="tile", crossing=crossing),
        odd=("shape.0",) if variant.even else ("shape.0", "shape.1"),
    )
