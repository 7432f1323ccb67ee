"""The MLP without its output projection's bias; it saves the pre-activation, not the GELU."""

from typing import Any

import torch
from torch import Tensor

from fastgpt2.kernels import checks, reference
from fastgpt2.kernels.backend import Impl, resolve, wants_gradient
from fastgpt2.kernels.gelu import check_form, gelu_fwd
from fastgpt2.kernels.linear import in_autocast_dtype, unchecked_linear
from fastgpt2.kernels.linear_gelu import linear_gelu


@torch.library.custom_op("fastgpt2::mlp_fwd", mutates_args=())
def _mlp_fwd(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor, form: str
) -> tuple[Tensor, Tensor]:
    """(y, z): z is x @ fc_weight.T without the bias."""
    z = unchecked_linear(x, fc_weight)
    return gelu_fwd(z, fc_bias, form) @ proj_weight.t(), z


@_mlp_fwd.register_fake
def _(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor, form: str
) -> tuple[Tensor, Tensor]:
    N = x.shape[0]
    return x.new_empty(N, proj_weight.shape[0]), x.new_empty(N, fc_weight.shape[0])


@torch.library.custom_op("fastgpt2::gelu_again_bwd", mutates_args=())
def _gelu_again_bwd(
    dhidden: Tensor, z: Tensor, bias: Tensor | None, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dbias, gelu(z + bias)) in one pass; dbias is empty without a bias."""
    from fastgpt2.kernels.jit import gelu as jit

    return jit.launch_bwd_with_y(dhidden, z, bias, form)


@_gelu_again_bwd.register_fake
def _(dhidden: Tensor, z: Tensor, bias: Tensor | None, form: str) -> tuple[Tensor, Tensor, Tensor]:
    dbias = z.new_empty(0) if bias is None else torch.empty_like(bias)
    return z.new_empty(z.shape), dbias, z.new_empty(z.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, z = output
    ctx.mark_non_differentiable(z)
    x, fc_weight, fc_bias, proj_weight, ctx.form = inputs
    dx_wanted, dfc_wanted, *_ = ctx.needs_input_grad
    # a frozen layer keeps nothing of its input
    kept = x if dfc_wanted else None, fc_weight if dx_wanted else None
    ctx.save_for_backward(*kept, fc_bias, proj_weight, z)


def _backward(ctx: Any, dy: Tensor, _dz: Tensor) -> tuple[Tensor | None, ...]:
    x, fc_weight, fc_bias, proj_weight, z = ctx.saved_tensors
    dx_wanted, dfc_wanted, _, dproj_wanted, _ = ctx.needs_input_grad
    dz, dbias, hidden = _gelu_again_bwd(dy @ proj_weight, z, fc_bias, ctx.form)
    dproj = dy.t() @ hidden if dproj_wanted else None
    # free it: it is as large as everything that was saved
    del hidden
    return (
        dz @ fc_weight if dx_wanted else None,
        dz.t() @ x if dfc_wanted else None,
        None if fc_bias is None else dbias,
        dproj,
        None,
    )


_mlp_fwd.register_autograd(_backward, setup_context=_save)


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    *,
    form: str = "tanh",
    impl: str = "auto",
) -> Tensor:
    """gelu(x @ fc_weight.T + fc_bias) @ proj_weight.T: GPT-2's MLP without its last bias.

    That bias is added with the branch, by ``add_layer_norm``. Products accumulate in fp32; weights
    and bias are taken in x's dtype (under autocast, in autocast's), which is the result's.
    ``triton`` saves x and the pre-activation for backward and recomputes the GELU in the pass that
    takes its derivative; ``torch`` saves both.

    Args:
        x: (..., C).
        fc_weight: (F, C).
        fc_bias: (F,) or None.
        proj_weight: (C', F).
        form: ``tanh`` or ``erf``, as in ``gelu``.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        (..., C').

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: a weight or the bias does not match; there is no such form.
        RuntimeError: as ``gelu``.
    """
    op = "mlp"
    checks.check_vectors(op, "x", x)
    checks.check_layer(op, x, fc_weight, fc_bias, "fc_")
    checks.check_dim(op, "proj_weight", proj_weight, 2, "(C', F)")
    expected = (proj_weight.shape[0], fc_weight.shape[0])
    checks.check_operand(op, "proj_weight", proj_weight, expected, x)
    check_form(op, form)
    x = in_autocast_dtype(x)
    if fc_bias is not None:
        fc_bias = fc_bias.to(x.dtype).contiguous()
    fc_weight, proj_weight = fc_weight.to(x.dtype), proj_weight.to(x.dtype)
    choice = resolve(op, impl, x)
    if choice is Impl.REFERENCE:
        return reference.mlp(x, fc_weight, fc_bias, proj_weight, form)
    if choice is Impl.TORCH or not wants_gradient(x, fc_weight, fc_bias, proj_weight):
        hidden = linear_gelu(x, fc_weight, fc_bias, form=form, impl=impl)
        return unchecked_linear(hidden, proj_weight)
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _mlp_fwd(rows, fc_weight, fc_bias, proj_weight, form)[0]
    return y.view(*x.shape[:-1], proj_weight.shape[0])
