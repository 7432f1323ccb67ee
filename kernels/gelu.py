"""GELU in GPT-2's tanh form, alone and with the bias of the projection before it."""

import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks, reference
from fastgpt2.kernels.backend import Impl, resolve


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
    raise RuntimeError("gelu: impl='triton' is not built yet")


def bias_gelu(x: Tensor, bias: Tensor, *, impl: str = "auto") -> Tensor:
    """gelu(x + bias): the bias of a projection and the activation after it, in one pass.

    Computed in fp32, y in x's dtype; the gradient of the bias comes from the same backward pass.

    Args:
        x: (..., F), a projection without its bias.
        bias: (F,).
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: bias does not match x's last dimension.
    """
    checks.check_floating("bias_gelu", "x", x)
    checks.check_shape("bias_gelu", "bias", bias, tuple(x.shape[-1:]), f"x {tuple(x.shape)}")
    match resolve("bias_gelu", impl, x):
        case Impl.REFERENCE:
            return reference.bias_gelu(x, bias)
        case Impl.TORCH:
            return F.gelu(x + bias.to(x.dtype), approximate="tanh")
    raise RuntimeError("bias_gelu: impl='triton' is not built yet")
