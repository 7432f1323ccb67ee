"""The head and the loss as one op, without the full logits in fp32.

Both ``torch`` and ``triton`` walk over chunks of rows: they compute a chunk's logits and losses and
overwrite the logits with the gradient of the losses, from which two matrix products compute the
gradients of x and weight. Nothing is computed twice: backward only scales what forward computed.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastgpt2.kernels import checks, reference
from fastgpt2.kernels.backend import Impl, resolve
from fastgpt2.kernels.cross_entropy import check_loss_options, gradient_scale, kept_count
from fastgpt2.kernels.linear import in_autocast_dtype, matmul
from fastgpt2.kernels.linear_fp8 import HeadFP8, check_fp8
from fastgpt2.kernels.modes import first_order, is_ordinary, recorded

# logits of one chunk, in the compute dtype: 2 GiB, 21 thousand rows of GPT-2's in bf16, keep the
# matrix products at full speed and leave most of a GPU's memory free; a CPU has less of both
TRITON_CHUNK_BYTES = 2**31
TORCH_CHUNK_BYTES = 2**28
# PyTorch's operators make fp32 copies, so they take a chunk's rows in tiles. On a CPU the copies
# then stay in its cache: a pass over it costs a third of one over memory
_CPU_TILE_ELEMENTS = 2**20
_GPU_TILE_ELEMENTS = 2**24
# rows of a matrix product's tile: a chunk is rounded up to a multiple of it
_TILE_ROWS = 128

# ignore_index, vocab_size, label_smoothing, z_loss
Options = tuple[int, int, float, float]


def _torch_losses(logits: Tensor, targets: Tensor, options: Options, with_grad: bool) -> Tensor:
    """Losses of the rows; with grad, the logits become the gradient of their sum."""
    elements = _CPU_TILE_ELEMENTS if logits.device.type == "cpu" else _GPU_TILE_ELEMENTS
    size = max(1, elements // logits.shape[1])
    tiles = zip(torch.split(logits, size), torch.split(targets, size), strict=True)
    return torch.cat([_tile_losses(*tile, options, with_grad) for tile in tiles])


def _tile_losses(logits: Tensor, targets: Tensor, options: Options, with_grad: bool) -> Tensor:
    ignore_index, vocab_size, label_smoothing, z_loss = options
    kept = targets != ignore_index
    safe_targets = targets.masked_fill(~kept, 0).long()[:, None]
    z, wide = logits[:, :vocab_size], _wide(logits.dtype)
    p = torch.softmax(z, dim=-1, dtype=wide)
    # a row's largest probability is 1 / sum(exp(z - max z)), and never smaller than 1 / V
    lse = z.amax(dim=-1).to(wide) - p.amax(dim=-1).log()
    losses = lse - (1.0 - label_smoothing) * z.gather(1, safe_targets)[:, 0].to(wide)
    if label_smoothing > 0:
        losses -= label_smoothing * z.mean(dim=-1, dtype=wide)
    losses = (losses + z_loss * lse.square()).masked_fill_(~kept, 0.0)
    if not with_grad:
        return losses
    # dz = softmax (1 + 2 z_loss lse) - (1 - s) onehot - s / V; 0 if ignored
    if z_loss > 0:
        p *= 1.0 + 2.0 * z_loss * lse[:, None]
    if label_smoothing > 0:
        p -= label_smoothing / vocab_size
    minus_one = p.new_full((1, 1), label_smoothing - 1.0)
    p.scatter_add_(1, safe_targets, minus_one.expand_as(safe_targets))
    logits[:, :vocab_size] = p.mul_(kept[:, None])
    logits[:, vocab_size:] = 0.0
    return losses


def _triton_losses(logits: Tensor, targets: Tensor, options: Options, with_grad: bool) -> Tensor:
    """As ``_torch_losses``, in one pass."""
    from fastgpt2.kernels.jit import cross_entropy as jit

    return jit.launch_in_place(logits, targets, options, with_grad=with_grad)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in ``dtype``, without rounding to a narrower one where that is supported."""
    if dtype != a.dtype and a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=dtype)
    return matmul(a, b).to(dtype)


def _chunk_rows(N: int, V: int, dtype: torch.dtype, triton: bool) -> int:
    """Rows of a chunk: all of them if their logits fit, else chunks of about equal size."""
    chunk_bytes = TRITON_CHUNK_BYTES if triton else TORCH_CHUNK_BYTES
    n_chunks = max(1, -(-N * V * dtype.itemsize // chunk_bytes))
    rows = -(-N // n_chunks)
    return max(1, min(N, -(-rows // _TILE_ROWS) * _TILE_ROWS))


def _dweight_dtype(x: Tensor, V: int, triton: bool) -> torch.dtype:
    """The dtype of the weight's gradient: a sum over chunks is fp32.

    A single product on a CPU stays in x's dtype, to which it has been rounded anyway.
    """
    N = x.shape[0]
    summed = x.device.type != "cpu" or _chunk_rows(N, V, x.dtype, triton) < N
    return _wide(x.dtype) if summed else x.dtype


class _Head:
    """The head's products with x (N, C) in x's dtype, the logits in one buffer of some rows."""

    def __init__(self, x: Tensor, weight: Tensor, size: int) -> None:
        self.x, self.weight = x, weight.to(x.dtype)
        self.size = size

    @cached_property
    def buffer(self) -> Tensor:
        """(size, V), made where a product first needs it."""
        return self.x.new_empty(self.size, self.weight.shape[0])

    def logits(self, rows: slice) -> Tensor:
        """(rows, V)."""
        count = rows.stop - rows.start
        return matmul(self.x[rows], self.weight.t(), into=lambda: self.buffer[:count])

    def gradient(self, dlogits: Tensor) -> Tensor:
        """Prepares dlogits for ``dx`` and ``dweight``."""
        return dlogits

    def dx(self, dlogits: Tensor) -> Tensor:
        """(rows, C)."""
        return matmul(dlogits, self.weight)

    def dweight(self, dlogits: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """(V, C), the share of these rows."""
        return _product(dlogits.t(), self.x[rows], dtype)


@torch.library.custom_op("fastgpt2::linear_cross_entropy_fwd", mutates_args=())
def _linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    dx_wanted: bool,
    dweight_wanted: bool,
    triton: bool,
    fp8: bool,
    anchor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, dx * count, dweight * count, count) in fp32; dx, maybe dweight too, in x's dtype.

    The gradients are those of the summed loss, divided by the count in backward: in fp16 the
    gradient of a mean over thousands of rows would underflow before a loss scale could reach it.
    They are empty where they are not wanted. ``anchor`` is for autograd, see ``_anchor``.
    """
    (N, C), V = x.shape, weight.shape[0]
    wide = _wide(x.dtype)
    row_losses = _triton_losses if triton else _torch_losses
    options = (ignore_index, vocab_size, label_smoothing, z_loss)
    losses = x.new_empty(N, dtype=wide)
    dx = x.new_empty(N, C) if dx_wanted else x.new_empty(0)
    dweight: Tensor | None = None
    dweight_dtype = _dweight_dtype(x, V, triton)
    size = _chunk_rows(N, V, x.dtype, triton)
    # without a z-loss, a row's gradient is a difference of two distributions: at most 1
    amax = 1.0 if z_loss == 0 else None
    head = (
        HeadFP8(x, weight, amax, turned=dweight_wanted, triton=triton)
        if fp8
        else _Head(x, weight, size)
    )
    for start in range(0, N, size):
        rows = slice(start, min(start + size, N))
        logits = head.logits(rows)
        losses[rows] = row_losses(logits, targets[rows], options, dx_wanted or dweight_wanted)
        dlogits: Any = head.gradient(logits) if dx_wanted or dweight_wanted else None
        if dx_wanted:
            dx[rows] = head.dx(dlogits)
        if rows.stop == N:
            # free the weight's copy before its gradient is allocated: peak memory is here
            del head.weight
        if dweight_wanted:
            product = head.dweight(dlogits, rows, dweight_dtype)
            dweight = product if dweight is None else dweight.add_(product)
    if dweight is None:
        dweight = weight.new_zeros((V, C) if dweight_wanted else (0,), dtype=dweight_dtype)
    count = kept_count(targets, ignore_index, wide)
    return losses.sum() / count.clamp(min=1), dx, dweight, count


@_linear_cross_entropy_fwd.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    dx_wanted: bool,
    dweight_wanted: bool,
    triton: bool,
    fp8: bool,
    anchor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = _wide(x.dtype)
    return (
        x.new_empty((), dtype=wide),
        x.new_empty(x.shape if dx_wanted else (0,)),
        weight.new_empty(
            weight.shape if dweight_wanted else (0,),
            dtype=_dweight_dtype(x, weight.shape[0], triton),
        ),
        x.new_empty((), dtype=wide),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, dx, dweight, count = output
    ctx.mark_non_differentiable(dx, dweight, count)
    ctx.save_for_backward(dx, dweight, count, inputs[11])
    ctx.weight_dtype, ctx.wanted = inputs[1].dtype, inputs[7:9]


def _scaled(dweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """dweight (V, C) times a scalar, multiplied in the scalar's dtype, in ``dtype``."""
    if dtype == scale.dtype or dweight.device.type != "cpu" or not is_ordinary(dweight):
        # a scalar tensor would leave the product in a short dweight's dtype
        return dweight.to(scale.dtype, copy=True).mul_(scale).to(dtype)
    out = dweight.new_empty(dweight.shape, dtype=dtype)
    rows = max(1, _CPU_TILE_ELEMENTS // dweight.shape[1])
    for first in range(0, len(out), rows):
        # some rows at a time, which stay in the caches
        some = dweight[first : first + rows].to(scale.dtype).mul_(scale)
        out[first : first + rows] = some
    return out


@first_order("linear_cross_entropy")
def _backward(ctx: Any, dloss: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
    # computed in the forward pass, so they cannot be differentiated again
    dx, dweight, count, _ = ctx.saved_tensors
    scale = gradient_scale(dloss, count)
    dx_wanted, dweight_wanted = ctx.wanted
    return (
        dx * scale if dx_wanted else None,
        _scaled(dweight, scale, ctx.weight_dtype) if dweight_wanted else None,
        *(None,) * 10,
    )


_linear_cross_entropy_fwd.register_autograd(_backward, setup_context=_save)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    fp8: bool = False,
    impl: str = "auto",
) -> Tensor:
    """cross_entropy(x @ weight.T, targets), never holding the full logits in fp32.

    Logits in x's dtype (under autocast, in autocast's), loss in fp32; the gradient is computed in
    the forward pass, that of the weight accumulates in fp32. The idea is that of Wijmans et al.,
    "Cut Your Losses in Large-Vocabulary Language Models", 2024; here the chunks are large and
    nothing is recomputed.

    Args:
        x: (..., C), the final LayerNorm's output.
        weight: (V', C), the head; rows from ``vocab_size`` on are padding.
        targets: (...), token ids in [0, vocab_size) or ``ignore_index``.
        ignore_index: targets of this value are left out of sum and count.
        vocab_size: V, number of true rows; None is all of them.
        label_smoothing: s in [0, 1).
        z_loss: weight of lse^2, 0 or more.
        fp8: whether the products run in FP8, as in ``linear_fp8``; C must be a multiple of 16.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        The scalar mean in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes do not match, an option is out of its range, or FP8 cannot run.
        TypeError: x or weight not floating point, targets not integer.
        RuntimeError: the gradient of the gradient is requested.
    """
    op = "linear_cross_entropy"
    checks.check_vectors(op, "x", x)
    checks.check_dim(op, "weight", weight, 2, "(V, C)")
    checks.check_operand(op, "weight", weight, (weight.shape[0], x.shape[-1]), x)
    checks.check_integer(op, "targets", targets)
    checks.check_shape(op, "targets", targets, x.shape[:-1], f"x {tuple(x.shape)}")
    checks.check_same_device(op, "targets", targets, x.device)
    vocab_size = check_loss_options(op, vocab_size, weight.shape[0], label_smoothing, z_loss)
    x = in_autocast_dtype(x)
    rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    options = (ignore_index, vocab_size, label_smoothing, z_loss)
    choice = resolve(op, impl, x)
    if choice is Impl.TORCH and recorded() and not fp8:
        # an exported program runs where our op is unknown
        choice = Impl.REFERENCE
    if fp8:
        check_fp8(op, x, x.shape[-1])
    if choice is Impl.REFERENCE:
        if fp8:
            raise ValueError(f"{op}: fp8 has no reference implementation")
        return reference.linear_cross_entropy(rows, weight.to(x.dtype), flat, *options)
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in (x, weight)]
    anchor = _anchor(rows, weight) if any(wanted) and not torch.compiler.is_compiling() else None
    loss: Tensor = _linear_cross_entropy_fwd(
        rows, weight, flat.contiguous(), *options, *wanted, choice is Impl.TRITON, fp8, anchor
    )[0]
    return loss


def _anchor(rows: Tensor, weight: Tensor) -> Tensor:
    """No elements, (0, C), and the two's place in the graph: the gradients depend on both.

    Compiled programs have no use for it: there is no graph of their gradients.
    """
    return torch.cat([rows[:0], weight[:0].to(rows.dtype)])
