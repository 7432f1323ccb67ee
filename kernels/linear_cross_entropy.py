"""The head and the loss as one op, without the full logits.

The ``torch`` implementation walks over chunks of rows: logits of a chunk, its loss, and at once
the gradient of loss with respect to x and weight, so neither the (N, V) logits nor their gradient
ever exist whole. Backward only scales what forward has computed.
"""

from typing import Any

import torch
from torch import Tensor

from fastgpt2.kernels import checks, reference
from fastgpt2.kernels.backend import Impl, resolve
from fastgpt2.kernels.cross_entropy import check_loss_options

# logits of one chunk: 2^24 elements, 64 MB in fp32
CHUNK_ELEMENTS = 2**24


@torch.library.custom_op("fastgpt2::linear_cross_entropy_chunked", mutates_args=())
def _chunked(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, dx * count, dweight * count, 1 / count): fp32 but dx, which has x's dtype.

    The gradients are those of the summed loss, divided by the count in backward: in fp16 the
    gradient of a mean over thousands of rows would underflow before a loss scale could reach it.
    They are empty without grad.
    """
    (N, C), V = x.shape, weight.shape[0]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    kept = targets != ignore_index
    safe_targets = targets.masked_fill(~kept, 0).long()
    inverse_count = 1.0 / kept.sum().clamp(min=1).to(wide)
    loss = torch.zeros((), dtype=wide, device=x.device)
    dx = torch.empty_like(x) if with_grad else x.new_empty(0)
    dweight = weight.new_zeros((V, C) if with_grad else (0,), dtype=wide)
    n_chunks = -(-N * V // CHUNK_ELEMENTS)
    size = -(-N // n_chunks) if N else 1
    buffer = x.new_empty((min(size, N), V))
    for start in range(0, N, size):
        rows = slice(start, min(start + size, N))
        x_rows, kept_rows, target_rows = x[rows], kept[rows], safe_targets[rows, None]
        logits = torch.mm(x_rows, weight.t(), out=buffer[: x_rows.shape[0]])
        z = logits[:, :vocab_size].to(wide)
        lse = torch.logsumexp(z, dim=-1)
        nll = lse - (1.0 - label_smoothing) * z.gather(1, target_rows)[:, 0]
        if label_smoothing > 0:
            nll -= label_smoothing * z.mean(dim=-1)
        row_loss = nll + z_loss * lse.square()
        loss += row_loss.masked_fill_(~kept_rows, 0.0).sum()
        if not with_grad:
            continue
        # dz = softmax (1 + 2 z_loss lse) - (1 - s) onehot - s / V; 0 if ignored
        dz = z.sub_(lse[:, None]).exp_()
        if z_loss > 0:
            dz *= 1.0 + 2.0 * z_loss * lse[:, None]
        if label_smoothing > 0:
            dz -= label_smoothing / vocab_size
        minus_one = dz.new_full((1, 1), label_smoothing - 1.0)
        dz.scatter_add_(1, target_rows, minus_one.expand_as(target_rows))
        dz *= kept_rows[:, None]
        logits[:, :vocab_size] = dz
        logits[:, vocab_size:] = 0.0
        torch.mm(logits, weight, out=dx[rows])
        if dweight.dtype == x.dtype:
            dweight.addmm_(logits.t(), x_rows)
        else:
            dweight += logits.t() @ x_rows
    return loss * inverse_count, dx, dweight, inverse_count


@_chunked.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty((), dtype=wide),
        torch.empty_like(x) if with_grad else x.new_empty(0),
        weight.new_empty(tuple(weight.shape) if with_grad else (0,), dtype=wide),
        x.new_empty((), dtype=wide),
    )


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, dx, dweight, inverse_count = output
    ctx.save_for_backward(dx, dweight, inverse_count)
    ctx.weight_dtype = inputs[1].dtype


def _scale_gradients(ctx: Any, dloss: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, inverse_count = ctx.saved_tensors
    scale = dloss * inverse_count
    return dx * scale, (dweight * scale).to(ctx.weight_dtype), *(None,) * 6


_chunked.register_autograd(_scale_gradients, setup_context=_save_gradients)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """cross_entropy(x @ weight.T, targets), never holding the full logits in fp32.

    The gradient is computed in the forward pass; that of the weight accumulates in fp32. Loss in
    fp32. Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, has the
    idea; here the chunks are large and nothing is recomputed.

    Args:
        x: (..., C), the final LayerNorm's output.
        weight: (V', C), the head; rows behind ``vocab_size`` are padding.
        targets: (...), token ids in [0, vocab_size) or ``ignore_index``.
        ignore_index: targets of this value are left out of sum and count.
        vocab_size: V, number of true rows; None is all of them.
        label_smoothing: s in [0, 1).
        z_loss: weight of lse^2, 0 or more.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        The scalar mean in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes do not match, or an option is out of its range.
        TypeError: x not floating point, targets not integer.
    """
    op = "linear_cross_entropy"
    checks.check_floating(op, "x", x)
    checks.check_dim(op, "weight", weight, 2, "(V, C)")
    checks.check_shape(op, "weight", weight, (weight.shape[0], x.shape[-1]), f"x {tuple(x.shape)}")
    checks.check_integer(op, "targets", targets)
    checks.check_shape(op, "targets", targets, tuple(x.shape[:-1]), f"x {tuple(x.shape)}")
    vocab_size = check_loss_options(op, vocab_size, weight.shape[0], label_smoothing, z_loss)
    rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    weight = weight.to(x.dtype)
    options = (ignore_index, vocab_size, label_smoothing, z_loss)
    match resolve(op, impl, x):
        case Impl.REFERENCE:
            return reference.linear_cross_entropy(rows, weight, flat, *options)
        case Impl.TORCH:
            with_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
            loss: Tensor = _chunked(rows, weight, flat, *options, with_grad)[0]
            return loss
    raise RuntimeError("linear_cross_entropy: impl='triton' is not built yet")
