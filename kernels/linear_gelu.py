"""The MLP's first half: projection, bias and GELU as one op."""

import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks, reference
from fastgpt2.kernels.backend import Impl, resolve


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, *, impl: str = "auto") -> Tensor:
    """gelu(x @ weight.T + bias), tanh form.

    Products accumulate in fp32; weight and bias are taken in x's dtype, which is y's.

    Args:
        x: (..., C).
        weight: (F, C).
        bias: (F,) or None.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: weight or bias does not match.
    """
    op = "linear_gelu"
    checks.check_floating(op, "x", x)
    checks.check_dim(op, "weight", weight, 2, "(F, C)")
    F_width = weight.shape[0]
    checks.check_shape(op, "weight", weight, (F_width, x.shape[-1]), f"x {tuple(x.shape)}")
    if bias is not None:
        checks.check_shape(op, "bias", bias, (F_width,), f"weight {tuple(weight.shape)}")
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    match resolve(op, impl, x):
        case Impl.REFERENCE:
            return reference.linear_gelu(x, weight, bias)
        case Impl.TORCH:
            return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    raise RuntimeError("linear_gelu: impl='triton' is not built yet")
