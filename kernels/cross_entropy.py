"""Cross-entropy of logits against token ids."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks, reference
from fastgpt2.kernels.backend import Impl, resolve


@torch.library.custom_op("fastgpt2::cross_entropy_fwd", mutates_args=())
def _cross_entropy_fwd(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, stats (2, N) of the rows, number of targets kept), all fp32."""
    from fastgpt2.kernels.jit import cross_entropy as jit

    options = (ignore_index, vocab_size, label_smoothing, z_loss)
    losses, stats = jit.launch_fwd(logits, targets, options)
    count = kept_count(targets, ignore_index, losses.dtype)
    return losses.sum() / count.clamp(min=1), stats, count


@_cross_entropy_fwd.register_fake
def _(logits: Tensor, *_unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    scalar = logits.new_empty((), dtype=torch.float32)
    return scalar, scalar.new_empty((2, logits.shape[0])), scalar.new_empty(())


@torch.library.custom_op("fastgpt2::cross_entropy_bwd", mutates_args=())
def _cross_entropy_bwd(
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    scale: Tensor,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    from fastgpt2.kernels.jit import cross_entropy as jit

    options = (ignore_index, vocab_size, label_smoothing, z_loss)
    return jit.launch_bwd(logits, targets, stats, scale, options)


@_cross_entropy_bwd.register_fake
def _(logits: Tensor, *_unused: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, *ctx.options = inputs
    _, stats, count = output
    ctx.mark_non_differentiable(stats, count)
    ctx.save_for_backward(logits, targets, stats, count)


def _backward(ctx: Any, dloss: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
    logits, targets, stats, count = ctx.saved_tensors
    # fp32 until the gradient is stored: in fp16 the gradient of a mean would underflow
    scale = gradient_scale(dloss, count)
    return _cross_entropy_bwd(logits, targets, stats, scale, *ctx.options), *(None,) * 5


_cross_entropy_fwd.register_autograd(_backward, setup_context=_save)


def kept_count(targets: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """Number of targets that are not ignored."""
    return (targets != ignore_index).sum().to(dtype)


def gradient_scale(dloss: Tensor, count: Tensor) -> Tensor:
    """The factor of the summed loss's gradient: dloss / count.

    It is 0 where no target is kept, even if dloss is infinite or NaN: that loss is a constant.
    """
    return (dloss / count.clamp(min=1)).masked_fill(count == 0, 0.0)


def check_loss_options(
    op: str, vocab_size: int | None, columns: int, label_smoothing: float, z_loss: float
) -> int:
    """Validate what both losses share; returns the number of true vocabulary columns."""
    if vocab_size is None:
        vocab_size = columns
    checks.check_int(op, "vocab_size", vocab_size)
    if not 1 <= vocab_size <= columns:
        raise ValueError(f"{op}: vocab_size must be in [1, {columns}], got {vocab_size}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1), got {label_smoothing}")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"{op}: z_loss must be finite and not negative, got {z_loss}")
    return vocab_size


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Mean over the targets kept of (1-s)(lse - z_y) + s(lse - mean_v z_v) + z_loss lse^2.

    lse = log sum_v exp z_v over the true vocabulary, s the label smoothing. fp32 throughout, the
    result too; 0 if no target is kept. z-loss: Chowdhery et al., "PaLM", 2022.

    Args:
        logits: (..., V'), V' >= vocab_size; columns beyond the vocabulary are padding.
        targets: (...), token ids in [0, vocab_size) or ``ignore_index``.
        ignore_index: targets of this value are left out of sum and count.
        vocab_size: V, number of true columns; None is all of them.
        label_smoothing: s in [0, 1).
        z_loss: weight of lse^2, 0 or more.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        The scalar mean in fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: shapes do not match, or an option is out of its range.
        TypeError: logits not floating point, targets or vocab_size not integer.
    """
    op = "cross_entropy"
    checks.check_vectors(op, "logits", logits)
    checks.check_integer(op, "targets", targets)
    checks.check_shape(
        op, "targets", targets, tuple(logits.shape[:-1]), f"logits {tuple(logits.shape)}"
    )
    checks.check_same_device(op, "targets", targets, logits.device)
    vocab_size = check_loss_options(op, vocab_size, logits.shape[-1], label_smoothing, z_loss)
    rows, flat = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    match resolve(op, impl, logits):
        case Impl.REFERENCE:
            return reference.cross_entropy(
                rows, flat, ignore_index, vocab_size, label_smoothing, z_loss
            )
        case Impl.TORCH:
            z = reference.up(rows[:, :vocab_size])
            total = F.cross_entropy(
                z,
                flat.long(),
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                reduction="sum",
            )
            if z_loss > 0:
                lse = z.logsumexp(dim=-1).masked_fill(flat == ignore_index, 0.0)
                total = total + z_loss * lse.square().sum()
            return total / kept_count(flat, ignore_index, total.dtype).clamp(min=1)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    loss: Tensor = _cross_entropy_fwd(
        rows, flat.contiguous(), ignore_index, vocab_size, label_smoothing, z_loss
    )[0]
    return loss
