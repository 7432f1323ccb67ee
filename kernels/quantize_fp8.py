"""Rounding to FP8 with one scale per tensor, in the two layouts that training multiplies.

The formats: e4m3 (four significant bits, up to 448) and e5m2 (three bits, up to 57344).
Micikevicius et al., "FP8 Formats for Deep Learning", 2022 (https://arxiv.org/abs/2209.05433).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt2.kernels import checks, tuning
from fastgpt2.kernels.backend import Impl, resolve
from fastgpt2.kernels.gpus import has_fp8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# widths of the operands of a product: tensor cores read 16 bytes at a time
MULTIPLE = 16
# the magnitude that a tensor of zeros is scaled by; 1 / this squared is still finite
_SMALLEST_AMAX = 2.0**-60


class Quantized(NamedTuple):
    """``values * inverse``: ``values`` (rows, columns) in an FP8 format, row-major.

    ``inverse`` is a scalar in fp32, the reciprocal of the scale.
    """

    values: Tensor
    inverse: Tensor

    def t(self) -> "Quantized":
        """The transpose, row-major again, its rows padded with zeros to a multiple of 16.

        A product sums along the rows, and the tensor cores need both operands row-major.
        """
        columns = self.values.shape[1]
        # as bytes, which PyTorch fills and copies on every device; 0 is a zero byte in both formats
        turned = self.values.view(torch.uint8).t()
        missing = _padded(self.values.shape[0]) - self.values.shape[0]
        if missing:
            turned = torch.cat([turned, turned.new_zeros(columns, missing)], dim=1)
        return Quantized(turned.contiguous().view(self.values.dtype), self.inverse)


def _padded(rows: int) -> int:
    return -(-rows // MULTIPLE) * MULTIPLE


def scaled_for(x: Tensor, dtype: torch.dtype, amax: Tensor) -> tuple[Tensor, Tensor]:
    """x * scale in fp32, and 1 / scale, with scale = largest number of ``dtype`` / ``amax``."""
    largest, amax = torch.finfo(dtype).max, amax.clamp(min=_SMALLEST_AMAX)
    # a one-dimensional factor makes the product fp32 without a pass of its own. An infinity times
    # its scale, zero, is NaN. Rounding adds less than a step of the format to the largest
    return x * (largest / amax)[None], amax / largest


def largest_of(x: Tensor) -> Tensor:
    """max |x| in fp32; NaN if an element is NaN, 0 if x is empty."""
    if x.numel() == 0:
        return x.new_zeros((), dtype=torch.float32)
    amax: Tensor = torch.linalg.vector_norm(x, ord=torch.inf, dtype=torch.float32)
    return amax


def quantize(x: Tensor, dtype: torch.dtype, amax: Tensor | None = None) -> Quantized:
    """``quantize_fp8`` without the transpose, by PyTorch's operators: the definition."""
    scaled, inverse = scaled_for(x, dtype, largest_of(x) if amax is None else amax)
    # row-major whatever x is: a GPU's product accepts nothing else
    return Quantized(scaled.to(dtype, memory_format=torch.contiguous_format), inverse)


def no_fp8_kernel(x: Tensor) -> Callable[[], str | None]:
    """What ``resolve`` asks: why no kernel rounds to FP8 on x's device, or None if one does."""

    def obstacle() -> str | None:
        arch = tuning.arch_of(x.device)
        if arch == tuning.INTERPRET or has_fp8(arch):
            return None
        return f"the kernels round to FP8 on NVIDIA GPUs from compute capability 8.9, not on {arch}"

    return obstacle


@torch.library.custom_op("fastgpt2::quantize_fp8", mutates_args=())
def _quantize_fp8(
    x: Tensor, amax: Tensor | None, dtype: torch.dtype, straight: bool, turned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, transpose, inverse) of an x that has elements; a layout not wanted is empty."""
    from fastgpt2.kernels.jit import quantize_fp8 as jit

    return jit.launch(x, amax, dtype, _padded(x.shape[0]), straight, turned)


@_quantize_fp8.register_fake
def _(
    x: Tensor, amax: Tensor | None, dtype: torch.dtype, straight: bool, turned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N, C = x.shape
    return (
        x.new_empty((N, C) if straight else (0,), dtype=dtype),
        x.new_empty((C, _padded(N)) if turned else (0,), dtype=dtype),
        x.new_empty((), dtype=torch.float32),
    )


def quantize_fp8(
    x: Tensor,
    dtype: torch.dtype,
    *,
    amax: Tensor | None = None,
    straight: bool = True,
    turned: bool = True,
    impl: str = "auto",
) -> tuple[Quantized, Quantized]:
    """q = round(x m / a) to the nearest even, and its transpose; m the largest number of ``dtype``.

    a = max |x|, at least 2^-60, so that zeros stay zeros. The scale m / a and its inverse are fp32,
    x is scaled in fp32 and rounded once. A NaN or an infinity in x makes every product of its row
    NaN, so that it is not hidden. There is no derivative: the op that quantises defines its own.

    Args:
        x: (N, C) in a floating dtype.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        amax: an fp32 scalar tensor that bounds |x|, taken for a; None means that a is computed.
        straight: whether q is wanted; if not, its values are empty.
        turned: whether the transpose is wanted; if not, its values are empty.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``; PyTorch's operators are the
            definition, so that the last two are one.

    Returns:
        q (N, C), and its transpose (C, N padded with zeros to a multiple of 16), both row-major.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x is not (N, C), dtype is not one of the two, or amax is not such a scalar.
        RuntimeError: ``triton`` was asked for by name and cannot run.
    """
    op = "quantize_fp8"
    checks.check_floating(op, "x", x)
    checks.check_dim(op, "x", x, 2, "(N, C)")
    if dtype not in (E4M3, E5M2):
        raise ValueError(f"{op}: dtype must be float8_e4m3fn or float8_e5m2, got {dtype}")
    if amax is not None:
        checks.check_shape(op, "amax", amax, (), "a scalar")
        checks.check_same_device(op, "amax", amax, x.device)
        if amax.dtype != torch.float32:
            raise ValueError(f"{op}: amax must be in float32, got {amax.dtype}")
    x = x.float() if x.dtype == torch.float64 else x
    if resolve(op, impl, x, no_fp8_kernel(x)) is Impl.TRITON and x.numel() > 0:
        values, transpose, inverse = _quantize_fp8(x, amax, dtype, straight, turned)
        return Quantized(values, inverse), Quantized(transpose, inverse)
    found = quantize(x, dtype, amax)
    nothing = Quantized(x.new_empty(0, dtype=dtype), found.inverse)
    return found if straight else nothing, found.t() if turned else nothing
