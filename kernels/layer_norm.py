"""LayerNorm, alone and fused with the residual addition before it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks, philox, reference
from fastgpt2.kernels.add_branch import check_branch, torch_update
from fastgpt2.kernels.backend import Impl, resolve


@torch.library.custom_op("fastgpt2::layer_norm_fwd", mutates_args=())
def _layer_norm_fwd(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(stream, norm, stats): without a branch the stream is empty; stats are mean and rstd."""
    from fastgpt2.kernels.jit import layer_norm as jit

    return jit.launch_fwd(x, branch, weight, bias, branch_bias, seed, dropout_p, eps)


@_layer_norm_fwd.register_fake
def _(x: Tensor, branch: Tensor | None, *_unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    N = x.numel() // x.shape[-1]
    return (
        x.new_empty((0,) if branch is None else x.shape),
        x.new_empty(x.shape, dtype=x.dtype if branch is None else branch.dtype),
        x.new_empty((2, N), dtype=torch.float32),
    )


@torch.library.custom_op("fastgpt2::layer_norm_bwd", mutates_args=())
def _layer_norm_bwd(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    stats: Tensor,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch, dweight, dbias, dbranch_bias); dbranch is empty where it equals dx."""
    from fastgpt2.kernels.jit import layer_norm as jit

    return jit.launch_bwd(dy, dstream, stream, weight, bias, branch_bias, stats, seed, dropout_p)


@_layer_norm_bwd.register_fake
def _(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    stats: Tensor,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    own_dbranch = seed is not None or dy.dtype != stream.dtype
    return (
        stream.new_empty(stream.shape),
        dy.new_empty(stream.shape if own_dbranch else (0,)),
        torch.empty_like(weight),
        torch.empty_like(weight if bias is None else bias),
        weight.new_empty(0) if branch_bias is None else torch.empty_like(branch_bias),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, branch, weight, bias, branch_bias, seed, ctx.dropout_p, _ = inputs
    stream, y, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.fused = branch is not None
    ctx.y_dtype = y.dtype
    ctx.save_for_backward(stream if ctx.fused else x, weight, bias, branch_bias, stats, seed)
    # a stream that is not used later has no gradient: do not allocate zeros for it
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dstream: Tensor | None, dy: Tensor | None, _dstats: Tensor | None
) -> tuple[Tensor | None, ...]:
    stream, weight, bias, branch_bias, stats, seed = ctx.saved_tensors
    if dy is None:
        dy = stream.new_zeros(stream.shape, dtype=ctx.y_dtype)
    dx, dbranch, dweight, dbias, dbranch_bias = _layer_norm_bwd(
        dy,
        dstream if ctx.fused else None,
        stream,
        weight,
        bias,
        branch_bias,
        stats,
        seed,
        ctx.dropout_p,
    )
    return (
        dx,
        (dbranch if dbranch.numel() else dx) if ctx.fused else None,
        dweight,
        None if bias is None else dbias,
        None if branch_bias is None else dbranch_bias,
        None,
        None,
        None,
    )


_layer_norm_fwd.register_autograd(_backward, setup_context=_save)


class _StreamLayerNorm(torch.autograd.Function):
    """x itself and its norm; one backward pass computes the norm's gradient and adds the other."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, y, stats = _layer_norm_fwd(x, None, weight, bias, None, None, 0.0, eps)
        return x.view_as(x), y, stats

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        x, weight, bias, _ = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(x, weight, bias, output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, dstream: Tensor | None, dy: Tensor | None, _dstats: None
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, stats = ctx.saved_tensors
        if dy is None:
            return dstream, None, None, None
        dx, _, dweight, dbias, _ = _layer_norm_bwd(
            dy, dstream, x, weight, bias, None, stats, None, 0.0
        )
        return dx, dweight, None if bias is None else dbias, None


# PyTorch's apply is untyped
_stream_layer_norm: Callable[..., tuple[Tensor, Tensor, Tensor]] = _StreamLayerNorm.apply


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _check_affine(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    checks.check_vectors(op, "x", x)
    checks.check_operand(op, "weight", weight, x.shape[-1:], x)
    if bias is not None:
        checks.check_operand(op, "bias", bias, x.shape[-1:], x)
    checks.check_positive(op, "eps", eps)


def _torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    # the operator wants one dtype; its statistics are fp32 either way
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """LayerNorm over the last dimension: y = (x - mean) / sqrt(var + eps) * weight + bias.

    Statistics in fp32, y in x's dtype. Ba, Kiros, Hinton, "Layer Normalization", 2016.

    Args:
        x: (..., C).
        weight: (C,), gamma.
        bias: (C,), beta, or None.
        eps: added to the biased variance.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Raises:
        ValueError: a shape or device does not match x's; eps is not positive.
        TypeError: a tensor is not floating point.
    """
    _check_affine("layer_norm", x, weight, bias, eps)
    match resolve("layer_norm", impl, x):
        case Impl.REFERENCE:
            return reference.layer_norm(x, weight, bias, eps)
        case Impl.TORCH:
            return _torch_layer_norm(x, weight, bias, eps)
    vectors = weight.contiguous(), _contiguous(bias), None
    y: Tensor = _layer_norm_fwd(x, None, *vectors, None, 0.0, eps)[1]
    return y


def stream_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``layer_norm``, and x itself for the residual stream that bypasses it.

    For two uses of x, autograd would add their gradients in a separate pass. Here ``triton`` adds
    the stream's gradient in the backward pass of the norm.

    Args:
        x: (..., C), the residual stream.
        weight: (C,), gamma.
        bias: (C,), beta, or None.
        eps: added to the biased variance.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        x and its norm, (..., C) each, in x's dtype.

    Raises:
        ValueError, TypeError: as ``layer_norm`` does.
    """
    op = "stream_layer_norm"
    _check_affine(op, x, weight, bias, eps)
    match resolve(op, impl, x):
        case Impl.REFERENCE:
            return x, reference.layer_norm(x, weight, bias, eps)
        case Impl.TORCH:
            return x, _torch_layer_norm(x, weight, bias, eps)
    stream, y, _ = _stream_layer_norm(x, weight.contiguous(), _contiguous(bias), eps)
    return stream, y


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    branch_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum, in one pass.

    s = x + dropout(branch + branch_bias);  returns (s, layer_norm(s, weight, bias)).

    Computed in fp32; s is rounded to x's dtype before it is normalised, and the norm has branch's
    dtype, so an fp32 stream can feed a bf16 block.

    Args:
        x: (..., C), the residual stream.
        branch: (..., C), what attention or MLP computed, without its projection's bias.
        weight: (C,), gamma.
        bias: (C,), beta, or None.
        branch_bias: (C,), the bias of the projection that computed ``branch``, or None.
        dropout_p: rate of the dropout on the branch.
        seed: key of the Philox dropout mask, the same on every implementation; None draws one
            (``torch`` then takes PyTorch's own dropout).
        eps: added to the biased variance.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Raises:
        ValueError: a shape or device does not match; dropout_p outside [0, 1); eps not positive.
        TypeError: a tensor is not floating point; seed is not an integer.
    """
    op = "add_layer_norm"
    _check_affine(op, x, weight, bias, eps)
    check_branch(op, x, branch, branch_bias)
    checks.check_dropout(op, dropout_p, seed)
    match resolve(op, impl, x):
        case Impl.REFERENCE:
            key = philox.as_seed(seed, x.device) if dropout_p > 0 else None
            return reference.add_layer_norm(
                x, branch, weight, bias, branch_bias, dropout_p, key, eps
            )
        case Impl.TORCH:
            stream = x + torch_update(branch, branch_bias, dropout_p, seed).to(x.dtype)
            return stream, _torch_layer_norm(stream, weight, bias, eps).to(branch.dtype)
    key = philox.as_seed(seed, x.device) if dropout_p > 0 else None
    vectors = weight.contiguous(), _contiguous(bias), _contiguous(branch_bias)
    stream, y, _ = _layer_norm_fwd(x, branch, *vectors, key, dropout_p, eps)
    return stream, y
