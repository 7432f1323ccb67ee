"""LayerNorm, alone and fused with the residual addition before it."""

import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks, philox, reference
from fastgpt2.kernels.backend import Impl, resolve


def _check_affine(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    checks.check_floating(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension")
    match = f"x {tuple(x.shape)}"
    checks.check_shape(op, "weight", weight, (x.shape[-1],), match)
    if bias is not None:
        checks.check_shape(op, "bias", bias, (x.shape[-1],), match)
    checks.check_positive(op, "eps", eps)


def _torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if x.is_cuda and weight.dtype != x.dtype:
        # the CUDA operator wants one dtype; statistics are fp32 inside it either way
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
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
        ValueError: a shape does not match x's; eps is not positive.
        TypeError: x is no floating-point tensor.
    """
    _check_affine("layer_norm", x, weight, bias, eps)
    match resolve("layer_norm", impl, x):
        case Impl.REFERENCE:
            return reference.layer_norm(x, weight, bias, eps)
        case Impl.TORCH:
            return _torch_layer_norm(x, weight, bias, eps)
    raise RuntimeError("layer_norm: impl='triton' is not built yet")


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
        branch: (..., C), what attention or MLP made, without its projection's bias.
        weight: (C,), gamma.
        bias: (C,), beta, or None.
        branch_bias: (C,), the bias of the projection that made ``branch``, or None.
        dropout_p: rate of the dropout on the branch.
        seed: key of the Philox dropout mask, the same on every implementation; None draws one
            (``torch`` then takes PyTorch's own dropout).
        eps: added to the biased variance.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Raises:
        ValueError: a shape does not match; dropout_p outside [0, 1); eps not positive.
        TypeError: x or branch is no floating-point tensor.
    """
    op = "add_layer_norm"
    _check_affine(op, x, weight, bias, eps)
    checks.check_floating(op, "branch", branch)
    checks.check_shape(op, "branch", branch, tuple(x.shape), f"x {tuple(x.shape)}")
    if branch_bias is not None:
        checks.check_shape(op, "branch_bias", branch_bias, (x.shape[-1],), f"x {tuple(x.shape)}")
    checks.check_dropout(op, dropout_p)
    match resolve(op, impl, x):
        case Impl.REFERENCE:
            key = philox.as_seed(seed, x.device) if dropout_p > 0 else None
            return reference.add_layer_norm(
                x, branch, weight, bias, branch_bias, dropout_p, key, eps
            )
        case Impl.TORCH:
            update = branch if branch_bias is None else branch + branch_bias.to(branch.dtype)
            if dropout_p > 0 and seed is None:
                update = F.dropout(update, dropout_p)
            elif dropout_p > 0:
                update = philox.dropout(update, dropout_p, philox.as_seed(seed, x.device))
            stream = x + update.to(x.dtype)
            return stream, _torch_layer_norm(stream, weight, bias, eps).to(branch.dtype)
    raise RuntimeError("add_layer_norm: impl='triton' is not built yet")
