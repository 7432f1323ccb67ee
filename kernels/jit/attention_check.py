"""A guard against assemblers that get attention wrong on Hopper.

Up to CUDA 12.9, ptxas may overwrite the registers of an asynchronous wgmma whose left operand lies
in registers (triton-lang/triton#11781); in flash-linear-attention#1262, 13.0 still failed and 13.1
passed. The products P V, P^T dO, dS^T Q and dS K are of that kind, and for sm_90 Triton 3.6 and
3.7 ship ptxas 12.8, Triton 3.8 and 3.9 ship 12.9. So on an sm_90 with a ptxas older than 13.1,
attention's results are compared with the reference before the first one is returned: once per
process and ``Kind``, since Triton builds another binary only for another kind.
"""

import math
import warnings
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton import knobs

from fastgpt2.kernels import reference
from fastgpt2.kernels.dropout_bits import bits_size
from fastgpt2.kernels.jit.attention import launch_fwd
from fastgpt2.kernels.jit.attention_bwd import launch_bwd
from fastgpt2.kernels.jit.launch import noting

SAFE_PTXAS = (13, 1)
HOPPER = (9, 0)
# several tiles of every kernel: whole tiles; an incomplete last tile, where T is a multiple of 16,
# where it makes a stride a multiple of 16, and where it is odd; a single token. Triton builds a
# binary for each, and all are checked at once: a length is not known when compiling
LENGTHS = (512, 528, 504, 501, 1)
# tolerance, relative to the gradients' norm: 16-bit rounding errs by half a percent, lost registers
# by far more
GRADIENT_TOLERANCE = 0.02


class Kind(NamedTuple):
    """What decides, besides the length, which of attention's binaries run.

    Attributes:
        dtype: of queries, keys and values.
        D: the head size.
        n_head: H, because Triton builds separate binaries for 1 and for multiples of 16.
        segments: dtype of the segment ids, None without them.
        key_range: dtype of the key range, None without it.
        dropout: whether there is any.
    """

    dtype: torch.dtype
    D: int
    n_head: int
    segments: torch.dtype | None
    key_range: torch.dtype | None
    dropout: bool


def is_suspect(dtype: torch.dtype, capability: tuple[int, int], ptxas: str) -> bool:
    """Whether this assembler may get the tensor-core products of this dtype and GPU wrong."""
    version = tuple(int(part) for part in ptxas.split(".")[:2])
    return dtype.itemsize == 2 and capability == HOPPER and version < SAFE_PTXAS


def _integers(shape: tuple[int, ...], largest: int, device: torch.device) -> Tensor:
    # a separate generator: a check must not change anybody's random numbers
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(device)


def passes(device: torch.device, kind: Kind) -> bool:
    """Whether attention's kernels of this kind are right, compared with fp64 on small integers.

    At a scale of ln 2 integer scores give powers of two as probabilities: every sum of the forward
    kernel is exact and only its last division rounds. Masks that hide nothing and dropout that
    drops nothing leave the numbers as they are and choose the kernels that have them.
    """
    dtype, D, H, segments_dtype, range_dtype, dropout = kind
    # two rows: the stride of a batch of one would not matter
    B = 2
    for T in LENGTHS:
        qkv = _integers((B, T, 3, H, D), 3, device)
        # few dimensions with scores of at most 4, spread over the head
        qkv[:, :, :2] = qkv[:, :, :2].clamp(-1, 1)
        qkv[:, :, 0].masked_fill_(torch.arange(D, device=device) % math.ceil(D / 4) != 0, 0)
        qkv = qkv.view(B, T, 3 * H * D).to(dtype)
        dout = _integers((B, T, H * D), 3, device).to(dtype)
        # every bit set: nothing is dropped
        size = bits_size(B, H, T)
        bits = torch.full((size,), -1, dtype=torch.int32, device=device) if dropout else None
        segments = key_range = None
        if segments_dtype is not None:
            segments = torch.zeros(B, T, dtype=segments_dtype, device=device)
        if range_dtype is not None:
            key_range = torch.tensor([[0, T]] * B, dtype=range_dtype, device=device)
        options = (bits, segments, key_range, H, 1e-12, math.log(2.0))
        # run these kernels even while launches are only noted for compilation
        with noting(None):
            out, lse = launch_fwd(qkv, *options)
            dqkv = launch_bwd(dout, qkv, out, lse, *options)
        with torch.inference_mode(False), torch.enable_grad():
            gold = qkv.double().requires_grad_()
            gold_out = reference.attention(gold, H, 0.0, None, None, None, math.log(2.0))
            (gold_dqkv,) = torch.autograd.grad(gold_out, gold, dout.double())
        rounding = torch.finfo(dtype).eps * gold_out.abs() + 1e-6
        # written so that a NaN fails
        if not bool(((out - gold_out).abs() <= rounding).all()):
            return False
        if not bool((dqkv - gold_dqkv).norm() <= GRADIENT_TOLERANCE * gold_dqkv.norm()):
            return False
    return True


@lru_cache
def obstacle(index: int, kind: Kind) -> str | None:
    """Why attention's kernels must not run on GPU ``index``, or None; warns the first time.

    Raises:
        RuntimeError: the kind has not been checked, and a CUDA graph is being captured.
    """
    if torch.version.hip is not None:
        return None
    ptxas = knobs.nvidia.ptxas.version
    if not is_suspect(kind.dtype, torch.cuda.get_device_capability(index), ptxas):
        return None
    if torch.cuda.is_current_stream_capturing():
        # the check waits for the GPU, which would break the capture
        raise RuntimeError(
            "attention: its self-check cannot run while a CUDA graph is captured; run attention "
            f"once before, with the same arguments but any length ({kind})"
        )
    if passes(torch.device("cuda", index), kind):
        return None
    fault = (
        f"ptxas {ptxas} builds kernels that compute wrong numbers here (head size {kind.D}, "
        f"{kind.dtype}); point TRITON_PTXAS_PATH to ptxas 13.1 or newer"
    )
    warnings.warn(f"attention: {fault}; impl='auto' takes PyTorch's attention", stacklevel=2)
    return fault
