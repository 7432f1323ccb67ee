"""The MLP's first half: projection, bias and GELU as one op."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks, reference
from fastgpt2.kernels.backend import Impl, resolve, wants_gradient
from fastgpt2.kernels.gelu import (
    APPROXIMATIONS,
    bias_gelu,
    check_form,
    gelu,
    gelu_bwd,
)
from fastgpt2.kernels.linear import in_autocast_dtype, linear_and_gelu, unchecked_linear
from fastgpt2.kernels.modes import is_ordinary


@torch.library.custom_op("fastgpt2::linear_gelu_fwd", mutates_args=())
def _linear_gelu_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, form: str, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """(y, z): z is x @ weight.T without the bias, empty without grad."""
    from fastgpt2.kernels.jit import linear_gelu as jit

    return jit.launch_fwd(x, weight, bias, form=form, with_grad=with_grad)


@_linear_gelu_fwd.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, form: str, with_grad: bool
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if with_grad else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.form, _ = inputs
    _, z = output
    ctx.mark_non_differentiable(z)
    dx_wanted, dweight_wanted, *_ = ctx.needs_input_grad
    # a frozen layer keeps nothing of its input
    ctx.save_for_backward(x if dweight_wanted else None, weight if dx_wanted else None, bias, z)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _backward(ctx: Any, dy: Tensor, _dz: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, z = ctx.saved_tensors
    dz, dbias = gelu_bwd(dy, z, bias, ctx.form)
    dx_wanted, dweight_wanted, *_ = ctx.needs_input_grad
    return (
        dz @ weight if dx_wanted else None,
        _rows(dz).t() @ _rows(x) if dweight_wanted else None,
        None if bias is None else dbias,
        None,
        None,
    )


_linear_gelu_fwd.register_autograd(_backward, setup_context=_save)


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    fused: bool = False,
    form: str = "tanh",
    impl: str = "auto",
) -> Tensor:
    """gelu(x @ weight.T + bias).

    Products accumulate in fp32; weight and bias are taken in x's dtype (under autocast, in
    autocast's), which is y's. ``triton`` is the library's product followed by ``bias_gelu``, or
    with ``fused`` one kernel of our own.

    Args:
        x: (..., C).
        weight: (F, C).
        bias: (F,) or None.
        fused: whether ``triton`` computes product, bias and GELU in one kernel. The benchmarks time
            both ways. The other implementations have one way and ignore this.
        form: ``tanh`` or ``erf``, as in ``gelu``.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: weight or bias does not match; there is no such form.
        RuntimeError: as ``gelu``.
    """
    op = "linear_gelu"
    checks.check_vectors(op, "x", x)
    checks.check_layer(op, x, weight, bias)
    check_form(op, form)
    x = in_autocast_dtype(x)
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    match resolve(op, impl, x):
        case Impl.REFERENCE:
            return reference.linear_gelu(x, weight, bias, form)
        case Impl.TORCH:
            approximate = APPROXIMATIONS[form]
            watched = torch.compiler.is_compiling() or not is_ordinary(x, weight, bias)
            if watched or wants_gradient(x, weight, bias):
                return F.gelu(unchecked_linear(x, weight, bias), approximate=approximate)
            fused_by_library = linear_and_gelu(_rows(x), weight, bias, approximate)
            return fused_by_library.view(*x.shape[:-1], weight.shape[0])
    if not fused:
        z = unchecked_linear(x, weight)
        if bias is None:
            return gelu(z, form=form, impl=impl)
        return bias_gelu(z, bias, form=form, impl=impl)
    with_grad = wants_gradient(x, weight, bias)
    bias = None if bias is None else bias.contiguous()
    y: Tensor = _linear_gelu_fwd(x, weight, bias, form, with_grad)[0]
    return y
