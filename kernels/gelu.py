"""GELU, in GPT-2's tanh form or exact, alone and with the bias of the projection before it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks, reference
from fastgpt2.kernels.backend import Impl, resolve

# a form's name, and PyTorch's name for it
APPROXIMATIONS = {"tanh": "tanh", "erf": "none"}


@torch.library.custom_op("fastgpt2::gelu_fwd", mutates_args=())
def gelu_fwd(x: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """gelu(x + bias)."""
    from fastgpt2.kernels.jit import gelu as jit

    return jit.launch_fwd(x, bias, form)


@gelu_fwd.register_fake
def _(x: Tensor, bias: Tensor | None, form: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("fastgpt2::gelu_bwd", mutates_args=())
def gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor | None, form: str) -> tuple[Tensor, Tensor]:
    """(dx, dbias); dbias is empty without a bias."""
    from fastgpt2.kernels.jit import gelu as jit

    return jit.launch_bwd(dy, x, bias, form)


@gelu_bwd.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor | None, form: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None, str], output: Tensor) -> None:
    x, bias, ctx.form = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
    x, bias = ctx.saved_tensors
    dx, dbias = gelu_bwd(dy, x, bias, ctx.form)
    return dx, None if bias is None else dbias, None


gelu_fwd.register_autograd(_backward, setup_context=_save)


def check_form(op: str, form: str) -> None:
    """Refuse a form of the GELU that does not exist."""
    if form not in APPROXIMATIONS:
        raise ValueError(f"{op}: form must be one of {', '.join(APPROXIMATIONS)}, got {form!r}")


def gelu(x: Tensor, *, form: str = "tanh", impl: str = "auto") -> Tensor:
    """y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), elementwise, or x/2 (1 + erf(x/sqrt(2))).

    Computed in fp32, y in x's dtype. Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016;
    the tanh form is the one in OpenAI's GPT-2, the erf form the one in nanoGPT.

    Args:
        x: any shape.
        form: ``tanh``, OpenAI's, or ``erf``, the exact GELU x/2 (1 + erf(x/sqrt(2))).
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: there is no such form.
        RuntimeError: ``triton`` was asked for by name and cannot run.
    """
    checks.check_floating("gelu", "x", x)
    check_form("gelu", form)
    match resolve("gelu", impl, x):
        case Impl.REFERENCE:
            return reference.gelu(x, form)
        case Impl.TORCH:
            return F.gelu(x, approximate=APPROXIMATIONS[form])
    y: Tensor = gelu_fwd(x, None, form)
    return y


def bias_gelu(x: Tensor, bias: Tensor, *, form: str = "tanh", impl: str = "auto") -> Tensor:
    """gelu(x + bias): the bias of a projection and the activation after it, in one pass.

    Computed in fp32, y in x's dtype; the gradient of the bias comes from the same backward pass.

    Args:
        x: (..., F), a projection without its bias.
        bias: (F,).
        form: ``tanh`` or ``erf``, as in ``gelu``.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Raises:
        TypeError: x or bias is not a floating-point tensor.
        ValueError: bias does not match x's last dimension or device; there is no such form.
        RuntimeError: as ``gelu``.
    """
    checks.check_rows("bias_gelu", "x", x)
    checks.check_operand("bias_gelu", "bias", bias, x.shape[-1:], x)
    check_form("bias_gelu", form)
    match resolve("bias_gelu", impl, x):
        case Impl.REFERENCE:
            return reference.bias_gelu(x, bias, form)
        case Impl.TORCH:
            return F.gelu(x + bias.to(x.dtype), approximate=APPROXIMATIONS[form])
    y: Tensor = gelu_fwd(x, bias.contiguous(), form)
    return y
