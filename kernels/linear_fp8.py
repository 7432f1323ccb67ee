"""Linear layers in FP8: operands of 8 bits, sums in fp32.

Each operand is scaled such that its largest magnitude becomes the format's, and rounded: e4m3 (four
significant bits, up to 448) for activations and weights, e5m2 (three bits, up to 57344) for
gradients, which spread wider. There is one scale per tensor, computed from its values in each step,
so nothing has to be calibrated or stored. Micikevicius et al., "FP8 Formats for Deep Learning",
2022 (https://arxiv.org/abs/2209.05433).

Backward multiplies transposes. ``quantize_fp8`` writes them beside the operands of the forward
product, and they alone are saved. Shapes: N rows, C wide, F features, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks
from fastgpt2.kernels.backend import Impl, capability, resolve, wants_gradient
from fastgpt2.kernels.linear import matmul
from fastgpt2.kernels.quantize_fp8 import (
    E4M3,
    E5M2,
    MULTIPLE,
    Quantized,
    largest_of,
    no_fp8_kernel,
    quantize_fp8,
    scaled_for,
)

# Ada's tensor cores are the first that multiply FP8
_OLDEST_CAPABILITY = (8, 9)
_DTYPES = (torch.bfloat16, torch.float32)
# logits quantised at a time: PyTorch's operators make an fp32 copy of their gradient
_TILE_ELEMENTS = 2**24


def _scaled_product(
    a: Tensor,
    b: Tensor,
    a_inverse: Tensor,
    b_inverse: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    # _scaled_mm cannot add a bias to an fp32 output
    inside = bias if out_dtype != torch.float32 else None
    out: Tensor = torch._scaled_mm(
        a,
        b.t(),
        scale_a=a_inverse,
        scale_b=b_inverse,
        bias=inside,
        out_dtype=out_dtype,
        use_fast_accum=fast,
    )
    return out if bias is None or inside is not None else out.add_(bias)


@torch.library.custom_op("fastgpt2::fp8_matmul", mutates_args=())
def _fp8_matmul(
    a: Tensor,
    b: Tensor,
    a_inverse: Tensor,
    b_inverse: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    """a (M, K) @ b (N, K)^T, both FP8 and row-major, * a_inverse * b_inverse + bias (N,).

    fp32 sums; ``fast`` lets Hopper's tensor cores keep fewer of their bits.
    """
    # the tensor cores' product rejects empty operands
    if a.is_cuda and a.numel() > 0 and b.numel() > 0:
        return _scaled_product(a, b, a_inverse, b_inverse, bias, out_dtype, fast)
    # FP8 numbers and their products are exact in fp32
    sums = matmul(
        a.float(),
        b.float().t(),
        # autocast would round a product that is not given its place
        into=lambda: a.new_empty(a.shape[0], b.shape[0], dtype=torch.float32),
    )
    sums.mul_(a_inverse).mul_(b_inverse)
    return (sums if bias is None else sums.add_(bias)).to(out_dtype)


@_fp8_matmul.register_fake
def _(
    a: Tensor,
    b: Tensor,
    a_inverse: Tensor,
    b_inverse: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def fp8_matmul(
    a: Quantized,
    b: Quantized,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """a (M, K) @ b (N, K)^T + bias (N,), rounded to ``dtype`` once; N and K multiples of 16."""
    out: Tensor = _fp8_matmul(a.values, b.values, a.inverse, b.inverse, bias, dtype, fast)
    return out


class _LinearFP8(torch.autograd.Function):
    """x (N, C), weight (F, C), bias (F,) or None -> (N, F)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dx_wanted: bool,
        dweight_wanted: bool,
        impl: str,
    ) -> Tensor:
        x8, x8_t = quantize_fp8(x, E4M3, turned=dweight_wanted, impl=impl)
        weight8, weight8_t = quantize_fp8(weight, E4M3, turned=dx_wanted, impl=impl)
        ctx.save_for_backward(*x8_t, *weight8_t)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.impl = impl
        short_bias = None if bias is None else bias.to(x.dtype)
        return fp8_matmul(x8, weight8, x.dtype, bias=short_bias, fast=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x8_t, weight8_t = Quantized(*ctx.saved_tensors[:2]), Quantized(*ctx.saved_tensors[2:])
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        dx_wanted, dweight_wanted, dbias_wanted, *_ = ctx.needs_input_grad
        dy8, dy8_t = quantize_fp8(
            dy, E5M2, straight=dx_wanted, turned=dweight_wanted, impl=ctx.impl
        )
        return (
            fp8_matmul(dy8, weight8_t, x_dtype) if dx_wanted else None,
            fp8_matmul(dy8_t, x8_t, weight_dtype) if dweight_wanted else None,
            dy.sum(0, dtype=torch.float32).to(bias_dtype) if dbias_wanted else None,
            *(None,) * 3,
        )


class HeadFP8:
    """The products of the head (V, C) with x (N, C), whose weight and x are quantised once.

    Inside, rows of zeros make V a multiple of 16: logits and their gradients have these columns.

    Args:
        x: (N, C).
        weight: (V, C).
        amax: a bound on the magnitude of the logits' gradient; None means that it is computed.
        turned: whether the transpose of the logits' gradient is wanted, for ``dweight``.
        triton: whether the kernels quantise, where they can.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, amax: float | None, *, turned: bool, triton: bool
    ) -> None:
        self.dtype, self.V, self.amax = x.dtype, weight.shape[0], amax
        able = triton and no_fp8_kernel(x)() is None
        self.turned, self.impl = turned, Impl.TRITON if able else Impl.TORCH
        padded = F.pad(weight, (0, 0, 0, -self.V % MULTIPLE))
        self.x, _ = quantize_fp8(x, E4M3, turned=False, impl=self.impl)
        self.weight, self.weight_t = quantize_fp8(padded, E4M3, impl=self.impl)

    def logits(self, rows: slice) -> Tensor:
        """(rows, V padded), in x's dtype."""
        return fp8_matmul(self._rows(rows), self.weight, self.dtype, fast=True)

    def gradient(self, dlogits: Tensor) -> tuple[Quantized, Quantized]:
        """dlogits (rows, V padded) in e5m2 and its transpose, for ``dx`` and ``dweight``."""
        amax = None
        if self.amax is not None:
            amax = dlogits.new_full((), self.amax, dtype=torch.float32)
        if self.impl is Impl.TRITON:
            return quantize_fp8(dlogits, E5M2, amax=amax, turned=self.turned, impl=self.impl)
        values = torch.empty_like(dlogits, dtype=E5M2)
        amax = largest_of(dlogits) if amax is None else amax
        size = max(1, _TILE_ELEMENTS // dlogits.shape[1])
        for tile, into in zip(torch.split(dlogits, size), torch.split(values, size), strict=True):
            scaled, inverse = scaled_for(tile, E5M2, amax)
            into.copy_(scaled)
        straight = Quantized(values, inverse)
        return straight, straight.t() if self.turned else straight

    def dx(self, dlogits: tuple[Quantized, Quantized]) -> Tensor:
        """(rows, C), in x's dtype."""
        return fp8_matmul(dlogits[0], self.weight_t, self.dtype)

    def dweight(
        self, dlogits: tuple[Quantized, Quantized], rows: slice, dtype: torch.dtype
    ) -> Tensor:
        """(V, C), the share of these rows."""
        return fp8_matmul(dlogits[1], self._rows(rows).t(), dtype)[: self.V]

    def _rows(self, rows: slice) -> Quantized:
        return Quantized(self.x.values[rows], self.x.inverse)


def fp8_obstacle(device: torch.device, dtype: torch.dtype, *widths: int) -> str | None:
    """Why FP8 cannot run, in a line, or None if it can: on a CPU it is emulated, and slow.

    Args:
        device: where the products would run.
        dtype: dtype of the activations.
        widths: C and F of the weights.
    """
    if dtype not in _DTYPES:
        return f"activations must be in bf16 or fp32, not {str(dtype).removeprefix('torch.')}"
    odd = [width for width in widths if width % MULTIPLE]
    if odd:
        return f"widths must be multiples of {MULTIPLE}, got {', '.join(map(str, odd))}"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"it runs on NVIDIA GPUs and, emulated, on CPUs, not on {device.type}"
    if torch.version.hip is not None:
        return "AMD's GPUs have other FP8 formats"
    major, minor = capability(device.index)
    if (major, minor) < _OLDEST_CAPABILITY:
        return f"the GPU has compute capability {major}.{minor}, FP8 needs 8.9"
    return None


def check_fp8(op: str, x: Tensor, *widths: int) -> None:
    """FP8 can run on x.

    Raises:
        ValueError: it cannot; says why.
    """
    obstacle = fp8_obstacle(x.device, x.dtype, *widths)
    if obstacle is not None:
        raise ValueError(f"{op}: FP8 cannot run: {obstacle}")


def linear_fp8(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """x @ weight.T + bias with all three products of training in FP8.

    y = q4(x) q4(W)^T + b, dx = q5(dy) q4(W), dW = q5(dy)^T q4(x), db = sum dy, where q4 and q5
    round to e4m3 and e5m2 after scaling by the tensor's largest magnitude. Sums are fp32; each
    result is rounded once, to x's dtype (dW and db to their parameter's). On a CPU the operands are
    rounded alike and the product runs in fp32: the same numbers, but no faster.

    Args:
        x: (..., C) in bf16 or fp32; C a multiple of 16.
        weight: (F, C), in any floating dtype; F a multiple of 16.
        bias: (F,) or None.
        impl: what quantises the operands, ``auto``, ``triton``, ``torch`` or ``reference``, as in
            ``quantize_fp8``; the products are the library's.

    Returns:
        (..., F), in x's dtype.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: weight or bias does not match, or FP8 cannot run on these (``fp8_obstacle``).
        RuntimeError: ``triton`` was asked for by name and cannot run.
    """
    op = "linear_fp8"
    checks.check_vectors(op, "x", x)
    checks.check_layer(op, x, weight, bias)
    F_width, C = weight.shape
    check_fp8(op, x, F_width, C)
    choice = resolve(op, impl, x, no_fp8_kernel(x))
    rows = x.reshape(-1, C)
    wanted = [wants_gradient(rows), wants_gradient(weight)]
    out: Tensor = _LinearFP8.apply(rows, weight, bias, *wanted, choice)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], F_width)
