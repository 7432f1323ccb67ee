"""GELU in GPT-2's tanh form, alone and with the bias of the projection before it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks, reference
from fastgpt2.kernels.backend import Impl, resolve


@torch.library.custom_op("fastgpt2::gelu_fwd", mutates_args=())
def gelu_fwd(x: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(x + bias)."""
    from fastgpt2.kernels.jit import gelu as jit

    return jit.launch_fwd(x, bias)


@gelu_fwd.register_fake
def _(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("fastgpt2::gelu_bwd", mutates_args=())
def gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dx, dbias); dbias is empty without a bias."""
    from fastgpt2.kernels.jit import gelu as jit

    return jit.launch_bwd(dy, x, bias)


@gelu_bwd.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    x, bias = ctx.saved_tensors
    dx, dbias = gelu_bwd(dy, x, bias)
    return dx, None if bias is None else dbias


gelu_fwd.register_autograd(_backward, setup_context=_save)


def gelu(x: Tensor, *, impl: str = "auto") -> Tensor:
    """y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), elementwise.

    Computed in fp32, y in x's dtype. Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016;
    the tanh form is the one in OpenAI's GPT-2.

    Args:
        x: any shape.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Raises:
        TypeError: x is no floating-point tensor.
    """
    checks.check_floating("gelu", "x", x)
    match resolve("gelu", impl, x):
        case Impl.REFERENCE:
            return reference.gelu(x)
        case Impl.TORCH:
            return F.gelu(x, approximate="tanh")
    y: Tensor = gelu_fwd(x, None)
    return y


def bias_gelu(x: Tensor, bias: Tensor, *, impl: str = "auto") -> Tensor:
    """gelu(x + bias): the bias of a projection and the activation after it, in one pass.

    Computed in fp32, y in x's dtype; the gradient of the bias comes from the same backward pass.

    Args:
        x: (..., F), a projection without its bias.
        bias: (F,).
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Raises:
        TypeError: x or bias is no floating-point tensor.
        ValueError: bias does not match x's last dimension or device.
    """
    checks.check_rows("bias_gelu", "x", x)
    checks.check_operand("bias_gelu", "bias", bias, x.shape[-1:], x)
    match resolve("bias_gelu", impl, x):
        case Impl.REFERENCE:
            return reference.bias_gelu(x, bias)
        case Impl.TORCH:
            return F.gelu(x + bias.to(x.dtype), approximate="tanh")
    y: Tensor = gelu_fwd(x, bias.contiguous())
    return y
