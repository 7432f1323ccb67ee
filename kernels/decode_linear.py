"""A linear layer for a few rows, with the ops before and after it: one launch in decoding."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks, reference
from fastgpt2.kernels.backend import Impl, resolve
from fastgpt2.kernels.gelu import APPROXIMATIONS
from fastgpt2.kernels.reference import Beside

# with more rows, the kernel's instructions take longer than reading the weights: matrix units win
MAX_ROWS = 8
# a form of the GELU may follow the product, or this: nothing
NO_GELU = "none"


@torch.library.custom_op("fastgpt2::decode_linear", mutates_args=())
def _decode_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    form: str,
    dtype: torch.dtype,
) -> Tensor:
    """y (B, F) in ``dtype``."""
    from fastgpt2.kernels.jit import decode_linear as jit

    beside = Beside(scales, bias, norm_weight, norm_bias, residual)
    return jit.launch(x, weight, beside, eps=eps, form=form, dtype=dtype)


@_decode_linear.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    # the dtype comes last
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=rest[-1])


def obstacle(x: Tensor) -> str | None:
    """Why the kernels should not run on x (B, C), or None if they should."""
    if x.shape[0] > MAX_ROWS:
        return f"the kernel is made for up to {MAX_ROWS} rows, not {x.shape[0]}"
    return None


def check_layer(op: str, x: Tensor, weight: Tensor, beside: Beside) -> None:
    """A layer's weight (F, C), floating point or int8, and what is beside it fit x (B, C)."""
    checks.check_vectors(op, "x", x)
    checks.check_dim(op, "x", x, 2, "(B, C)")
    checks.check_dim(op, "weight", weight, 2, "(F, C)")
    B, C = x.shape
    features = weight.shape[0]
    if not (weight.is_floating_point() or weight.dtype == torch.int8):
        raise TypeError(f"{op}: weight must be floating point or int8, got {weight.dtype}")
    checks.check_shape(op, "weight", weight, (features, C), f"x {tuple(x.shape)}")
    checks.check_same_device(op, "weight", weight, x.device)
    if beside.norm_bias is not None and beside.norm_weight is None:
        raise ValueError(f"{op}: norm_bias must be None without norm_weight, got a tensor")
    shapes = ((features,), (features,), (C,), (C,), (B, features))
    for name, given, shape in zip(Beside._fields, beside, shapes, strict=True):
        if given is not None:
            checks.check_operand(op, name, given, shape, x)


def decode_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    form: str = NO_GELU,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """y_b = residual_b + gelu(scales (W norm(x_b)) + bias), for the few rows of a decoding step.

    Norm, GELU and addition are optional. The Triton kernel computes in fp32 and rounds once, at the
    end. The library (``torch``) rounds to ``dtype`` between its operators. No gradient flows
    through the kernel; autocast does not change it.

    Args:
        x: (B, C). Above ``MAX_ROWS`` rows, ``auto`` takes the library and ``triton`` refuses.
        weight: (F, C), floating point or int8.
        bias: (F,) or None.
        scales: (F,), the scales of int8 weights; None means 1.
        norm_weight: (C,), gamma of the LayerNorm of x before the product; None means no LayerNorm.
        norm_bias: (C,), beta, or None.
        eps: epsilon of the LayerNorm, positive.
        form: ``tanh`` or ``erf``, as in ``gelu``, or ``none``.
        residual: (B, F) or None.
        dtype: dtype of y; None means that of the residual, or else of x.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        (B, F).

    Raises:
        ValueError: a shape, device, form or eps does not fit.
        TypeError: a tensor is not floating point (weight may be int8), or dtype is not.
        RuntimeError: ``triton`` was asked for and cannot run.
    """
    op = "decode_linear"
    beside = Beside(scales, bias, norm_weight, norm_bias, residual)
    check_layer(op, x, weight, beside)
    checks.check_positive(op, "eps", eps)
    if form not in (*APPROXIMATIONS, NO_GELU):
        forms = ", ".join((*APPROXIMATIONS, NO_GELU))
        raise ValueError(f"{op}: form must be one of {forms}, got {form!r}")
    if dtype is None:
        dtype = x.dtype if residual is None else residual.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"{op}: dtype must be floating point, got {dtype}")
    match resolve(op, impl, x, lambda: obstacle(x)):
        case Impl.REFERENCE:
            return reference.decode_linear(x, weight, beside, eps, form).to(dtype)
        case Impl.TORCH:
            return by_library(x, weight, beside, eps, form, dtype)
    tensors = [None if t is None else adjacent(t) for t in (x, weight, *beside)]
    out: Tensor = _decode_linear(*tensors, eps, form, dtype)
    return out


def adjacent(x: Tensor) -> Tensor:
    """``x``, copied only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def by_library(
    x: Tensor, weight: Tensor, beside: Beside, eps: float, form: str, dtype: torch.dtype
) -> Tensor:
    """The layer by PyTorch's operators, (B, F) in ``dtype``."""
    scales, bias, norm_weight, norm_bias, residual = beside

    def cast(given: Tensor | None, like: torch.dtype) -> Tensor | None:
        return None if given is None else given.to(like)

    # the dtype of the products: that of the weights, or for int8 the narrower of x's and y's
    narrow = min(x.dtype, dtype, key=lambda d: d.itemsize)
    inner = narrow if weight.dtype == torch.int8 else weight.dtype
    with torch.autocast(x.device.type, enabled=False):
        if norm_weight is not None:
            affine = norm_weight.to(x.dtype), cast(norm_bias, x.dtype)
            x = F.layer_norm(x, x.shape[-1:], *affine, eps)
        x, weight = x.to(inner), weight.to(inner)
        if scales is None:
            y = F.linear(x, weight, cast(bias, inner))
        else:
            y = F.linear(x, weight) * scales
            y = y if bias is None else y + bias
        if form != NO_GELU:
            y = F.gelu(y, approximate=APPROXIMATIONS[form])
        if residual is not None:
            y = residual + y
    return y.to(dtype)
