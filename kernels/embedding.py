"""Token embedding plus position embedding, with dropout."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks, philox, reference
from fastgpt2.kernels.backend import Impl, resolve
from fastgpt2.kernels.modes import first_order, recorded


@torch.library.custom_op("fastgpt2::embedding_fwd", mutates_args=())
def _embedding_fwd(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor,
    positions: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,
) -> Tensor:
    from fastgpt2.kernels.jit import embedding as jit

    return jit.launch_fwd(idx, wte, wpe, positions, seed, dropout_p, dtype)


@_embedding_fwd.register_fake
def _(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor,
    positions: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,
) -> Tensor:
    return wte.new_empty((*idx.shape, wte.shape[1]), dtype=dtype)


@torch.library.custom_op("fastgpt2::embedding_bwd", mutates_args=("dwte", "dwpe"))
def _embedding_bwd(
    dx: Tensor,
    idx: Tensor,
    positions: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    dwte: Tensor,
    dwpe: Tensor,
) -> None:
    """Add the gradients of the tables to dwte and dwpe, summed in fp32 and in a fixed order."""
    from fastgpt2.kernels.jit import embedding as jit

    jit.launch_bwd(dx, jit.sorted_segments(idx, dwte.shape[0]), seed, dropout_p, dwte)
    if positions is None:
        B, T = idx.shape
        places = jit.counting_segments(B, T, dwpe.shape[0], idx.device)
    else:
        places = jit.sorted_segments(positions, dwpe.shape[0])
    jit.launch_bwd(dx, places, seed, dropout_p, dwpe)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    idx, wte, wpe, positions, seed, ctx.dropout_p, _ = inputs
    ctx.save_for_backward(idx, positions, seed)
    ctx.tables = (wte.shape, wte.dtype), (wpe.shape, wpe.dtype)


@first_order("embedding")
def _backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
    shape, dtype = ctx.tables[0]
    return _add_gradients(ctx, dx, dx.new_zeros(shape, dtype=dtype))


def _add_gradients(ctx: Any, dx: Tensor, dwte: Tensor) -> tuple[Tensor | None, ...]:
    shape, dtype = ctx.tables[1]
    dwpe = dx.new_zeros(shape, dtype=dtype)
    _embedding_bwd(dx, *ctx.saved_tensors, ctx.dropout_p, dwte, dwpe)
    return None, dwte, dwpe, None, None, None, None


_embedding_fwd.register_autograd(_backward, setup_context=_save)


class _TiedEmbedding(torch.autograd.Function):
    """``_embedding_fwd``, plus a view of wte: backward adds the embedding's gradient to its own."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        wte: Tensor = inputs[1]
        return _embedding_fwd(*inputs), wte.view_as(wte)

    setup_context = staticmethod(_save)

    # the sums are added in place, which autograd does not see
    @staticmethod
    @first_order("tied_embedding")
    def backward(ctx: Any, dx: Tensor, dhead: Tensor) -> tuple[Tensor | None, ...]:
        # create_graph=True: the graph may need dhead as it is
        own = dhead.clone() if dhead.requires_grad else dhead
        return _add_gradients(ctx, dx, own.contiguous())


class _TiedRows(torch.autograd.Function):
    """The same with PyTorch's operators, without the positions: wte[idx], and a view of wte."""

    @staticmethod
    def forward(idx: Tensor, wte: Tensor) -> tuple[Tensor, Tensor]:
        return F.embedding(idx, wte), wte.view_as(wte)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, drows: Tensor, dhead: Tensor) -> tuple[None, Tensor]:
        (idx,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            # create_graph=True: the graph may need dhead unchanged
            return None, dhead.index_put((idx,), drows, accumulate=True)
        return None, dhead.contiguous().index_put_((idx,), drows, accumulate=True)


# PyTorch's apply is untyped
_tied_embedding: Callable[..., tuple[Tensor, Tensor]] = _TiedEmbedding.apply
_tied_rows: Callable[..., tuple[Tensor, Tensor]] = _TiedRows.apply


def embedding(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor,
    *,
    positions: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """x = dropout(wte[idx] + wpe[positions]), the sum in fp32.

    Args:
        idx: (B, T), token ids in [0, V).
        wte: (V, C), token embedding, tied to the head.
        wpe: (block_size, C), position embedding.
        positions: (B, T) or (T,), position ids; None counts 0 .. T-1.
        dropout_p: rate of the dropout on the sum.
        seed: key of the Philox dropout mask, the same on every implementation; None draws one
            (``torch`` then takes PyTorch's own dropout).
        dtype: dtype of the result; None means wte's.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        (B, T, C).

    Raises:
        ValueError: a shape does not match; more tokens than positions; dropout_p outside [0, 1).
        TypeError: idx, positions or seed is not integer; wte, wpe or dtype not floating point.
    """
    return _embed("embedding", idx, wte, wpe, positions, dropout_p, seed, dtype, impl, False)[0]


def tied_embedding(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor,
    *,
    positions: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``embedding``, plus a view of wte for the head that is tied to it.

    Backward adds the embedding's gradient in place to the head's, in the rows that occur; with two
    uses of wte, autograd would fill a second table, mostly zeros, and add both. So the view must go
    to one op that keeps no reference to the gradient it returns: ``linear_cross_entropy``.

    Args:
        idx, wte, wpe, positions, dropout_p, seed, dtype, impl: as in ``embedding``.

    Returns:
        (B, T, C), and a view of wte (V, C).

    Raises:
        ValueError, TypeError: as ``embedding`` does.
    """
    return _embed("tied_embedding", idx, wte, wpe, positions, dropout_p, seed, dtype, impl, True)


def _embed(
    op: str,
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor,
    positions: Tensor | None,
    dropout_p: float,
    seed: int | Tensor | None,
    dtype: torch.dtype | None,
    impl: str,
    tied: bool,
) -> tuple[Tensor, Tensor]:
    checks.check_integer(op, "idx", idx)
    checks.check_dim(op, "idx", idx, 2, "(B, T)")
    checks.check_vectors(op, "wte", wte)
    checks.check_dim(op, "wte", wte, 2, "(V, C)")
    if wte.shape[0] == 0:
        raise ValueError(f"{op}: wte must have at least one row, got shape {tuple(wte.shape)}")
    checks.check_floating(op, "wpe", wpe)
    checks.check_dim(op, "wpe", wpe, 2, "(T_max, C)")
    checks.check_shape(op, "wpe", wpe, (wpe.shape[0], wte.shape[1]), f"wte {tuple(wte.shape)}")
    for name, x in (("idx", idx), ("wpe", wpe)):
        checks.check_same_device(op, name, x, wte.device)
    checks.check_dropout(op, dropout_p, seed)
    T = idx.shape[1]
    if positions is None:
        if wpe.shape[0] < T:
            raise ValueError(f"{op}: {T} tokens, but wpe has only {wpe.shape[0]} positions")
    else:
        checks.check_integer(op, "positions", positions)
        expected = tuple(idx.shape)[-positions.dim() :]
        checks.check_shape(op, "positions", positions, expected, f"idx {tuple(idx.shape)}")
        checks.check_same_device(op, "positions", positions, idx.device)
    dtype = wte.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"{op}: dtype must be floating point, got {dtype}")
    places = torch.arange(T, device=idx.device) if positions is None else positions
    match resolve(op, impl, wte):
        case Impl.REFERENCE:
            key = philox.as_seed(seed, wte.device) if dropout_p > 0 else None
            return reference.embedding(idx, wte, wpe, places, dropout_p, key, dtype), wte
        case Impl.TORCH:
            in_place = tied and not recorded()
            rows, head = _tied_rows(idx, wte) if in_place else (F.embedding(idx, wte), wte)
            wide = torch.promote_types(wte.dtype, dtype)
            x = rows.to(wide) + F.embedding(places, wpe).to(wide)
            if dropout_p > 0 and seed is None:
                x = F.dropout(x, dropout_p)
            elif dropout_p > 0:
                x = philox.dropout(x, dropout_p, philox.as_seed(seed, wte.device))
            return x.to(dtype), head
    key = philox.as_seed(seed, wte.device) if dropout_p > 0 else None
    # None stands for positions 0, 1, 2, ..., which backward need not sort
    given = None if positions is None else places.expand(idx.shape).contiguous()
    dense = (t if t.stride(1) == 1 else t.contiguous() for t in (wte, wpe))
    inputs = (idx.contiguous(), *dense, given, key, dropout_p, dtype)
    if tied:
        return _tied_embedding(*inputs)
    return _embedding_fwd(*inputs), wte
