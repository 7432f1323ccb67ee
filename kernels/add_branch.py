"""The residual addition that ends a block: bias, dropout and sum in one pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks, philox, reference
from fastgpt2.kernels.backend import Impl, resolve


@torch.library.custom_op("fastgpt2::add_branch_fwd", mutates_args=())
def _add_branch_fwd(
    x: Tensor, branch: Tensor, bias: Tensor | None, seed: Tensor | None, dropout_p: float
) -> Tensor:
    """x + dropout(branch + bias)."""
    from fastgpt2.kernels.jit import add_branch as jit

    return jit.launch_fwd(x, branch, bias, seed, dropout_p)


@_add_branch_fwd.register_fake
def _(
    x: Tensor, branch: Tensor, bias: Tensor | None, seed: Tensor | None, dropout_p: float
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("fastgpt2::add_branch_bwd", mutates_args=())
def _add_branch_bwd(
    dy: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(dbranch, dbias): dbranch is empty where it equals dy, dbias without a bias."""
    from fastgpt2.kernels.jit import add_branch as jit

    return jit.launch_bwd(dy, bias, seed, dropout_p, branch_dtype)


@_add_branch_bwd.register_fake
def _(
    dy: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    own_dbranch = seed is not None or dy.dtype != branch_dtype
    return (
        dy.new_empty(dy.shape if own_dbranch else (0,), dtype=branch_dtype),
        dy.new_empty(0) if bias is None else torch.empty_like(bias),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, branch, bias, seed, ctx.dropout_p = inputs
    ctx.branch_dtype = branch.dtype
    ctx.save_for_backward(bias, seed)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    bias, seed = ctx.saved_tensors
    dbranch, dbias = _add_branch_bwd(dy, bias, seed, ctx.dropout_p, ctx.branch_dtype)
    own_dbranch = seed is not None or dy.dtype != ctx.branch_dtype
    return dy, dbranch if own_dbranch else dy, None if bias is None else dbias, None, None


_add_branch_fwd.register_autograd(_backward, setup_context=_save)


def torch_update(
    branch: Tensor, bias: Tensor | None, dropout_p: float, seed: int | Tensor | None
) -> Tensor:
    """dropout(branch + bias) by PyTorch's operators, in branch's dtype."""
    update = branch if bias is None else branch + bias.to(branch.dtype)
    if dropout_p > 0 and seed is None:
        return F.dropout(update, dropout_p)
    if dropout_p > 0:
        return philox.dropout(update, dropout_p, philox.as_seed(seed, branch.device))
    return update


def check_branch(op: str, x: Tensor, branch: Tensor, branch_bias: Tensor | None) -> None:
    """``branch`` has x's shape, ``branch_bias`` (C,) or None."""
    checks.check_operand(op, "branch", branch, x.shape, x)
    if branch_bias is not None:
        checks.check_operand(op, "branch_bias", branch_bias, x.shape[-1:], x)


def add_branch(
    x: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Add a branch to the residual stream: x + dropout(branch + branch_bias), in one pass.

    Computed in fp32, rounded once, to x's dtype.

    Args:
        x: (..., C), the residual stream.
        branch: (..., C), what attention or MLP computed, without its projection's bias.
        branch_bias: (C,), the bias of the projection that computed ``branch``, or None.
        dropout_p: rate of the dropout on the branch.
        seed: key of the Philox dropout mask, the same on every implementation; None draws one
            (``torch`` then takes PyTorch's own dropout).
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        (..., C), in x's dtype.

    Raises:
        ValueError: a shape or device does not match; dropout_p outside [0, 1).
        TypeError: a tensor is not floating point; seed is not an integer.
    """
    op = "add_branch"
    checks.check_vectors(op, "x", x)
    check_branch(op, x, branch, branch_bias)
    checks.check_dropout(op, dropout_p, seed)
    chosen = resolve(op, impl, x)
    if chosen is Impl.TORCH:
        return x + torch_update(branch, branch_bias, dropout_p, seed).to(x.dtype)
    key = philox.as_seed(seed, x.device) if dropout_p > 0 else None
    if chosen is Impl.REFERENCE:
        return reference.add_branch(x, branch, branch_bias, dropout_p, key)
    bias = None if branch_bias is None else branch_bias.contiguous()
    y: Tensor = _add_branch_fwd(x, branch, bias, key, dropout_p)
    return y
