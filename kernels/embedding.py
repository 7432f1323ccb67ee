"""Token embedding plus position embedding, with dropout."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks, philox, reference
from fastgpt2.kernels.backend import Impl, resolve


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


@torch.library.custom_op("fastgpt2::embedding_bwd", mutates_args=())
def _embedding_bwd(
    dx: Tensor,
    idx: Tensor,
    positions: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    vocab_size: int,
    wte_dtype: torch.dtype,
    block_size: int,
    wpe_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(dwte, dwpe), each summed in fp32 and in a fixed order."""
    from fastgpt2.kernels.jit import embedding as jit

    tokens = jit.sorted_segments(idx, vocab_size)
    if positions is None:
        B, T = idx.shape
        places = jit.counting_segments(B, T, block_size, idx.device)
    else:
        places = jit.sorted_segments(positions, block_size)
    return (
        jit.launch_bwd(dx, tokens, seed, dropout_p, wte_dtype),
        jit.launch_bwd(dx, places, seed, dropout_p, wpe_dtype),
    )


@_embedding_bwd.register_fake
def _(
    dx: Tensor,
    idx: Tensor,
    positions: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    vocab_size: int,
    wte_dtype: torch.dtype,
    block_size: int,
    wpe_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    C = dx.shape[-1]
    return (
        dx.new_empty((vocab_size, C), dtype=wte_dtype),
        dx.new_empty((block_size, C), dtype=wpe_dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    idx, wte, wpe, positions, seed, ctx.dropout_p, _ = inputs
    ctx.save_for_backward(idx, positions, seed)
    ctx.tables = (wte.shape[0], wte.dtype, wpe.shape[0], wpe.dtype)


def _backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
    dwte, dwpe = _embedding_bwd(dx, *ctx.saved_tensors, ctx.dropout_p, *ctx.tables)
    return None, dwte, dwpe, None, None, None, None


_embedding_fwd.register_autograd(_backward, setup_context=_save)


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
        dtype: of the result; None is wte's.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        (B, T, C).

    Raises:
        ValueError: a shape does not match; more tokens than positions; dropout_p outside [0, 1).
        TypeError: idx or positions is no integer tensor.
    """
    op = "embedding"
    checks.check_integer(op, "idx", idx)
    checks.check_dim(op, "idx", idx, 2, "(B, T)")
    checks.check_floating(op, "wte", wte)
    checks.check_dim(op, "wte", wte, 2, "(V, C)")
    checks.check_shape(op, "wpe", wpe, (wpe.shape[0], wte.shape[1]), f"wte {tuple(wte.shape)}")
    checks.check_same_device(op, "idx", idx, wte.device)
    checks.check_dropout(op, dropout_p)
    T = idx.shape[1]
    if positions is None:
        if wpe.shape[0] < T:
            raise ValueError(f"{op}: {T} tokens, but wpe has only {wpe.shape[0]} positions")
    else:
        checks.check_integer(op, "positions", positions)
        expected = tuple(idx.shape)[-positions.dim() :]
        checks.check_shape(op, "positions", positions, expected, f"idx {tuple(idx.shape)}")
    dtype = wte.dtype if dtype is None else dtype
    places = torch.arange(T, device=idx.device) if positions is None else positions
    match resolve(op, impl, wte):
        case Impl.REFERENCE:
            key = philox.as_seed(seed, wte.device) if dropout_p > 0 else None
            return reference.embedding(idx, wte, wpe, places, dropout_p, key, dtype)
        case Impl.TORCH:
            wide = torch.promote_types(wte.dtype, dtype)
            x = F.embedding(idx, wte).to(wide) + F.embedding(places, wpe).to(wide)
            if dropout_p > 0 and seed is None:
                x = F.dropout(x, dropout_p)
            elif dropout_p > 0:
                x = philox.dropout(x, dropout_p, philox.as_seed(seed, wte.device))
            return x.to(dtype)
    key = philox.as_seed(seed, wte.device) if dropout_p > 0 else None
    # None, positions that count, needs no sorting in backward
    given = None if positions is None else places.expand(idx.shape).contiguous()
    wte, wpe = (t if t.stride(1) == 1 else t.contiguous() for t in (wte, wpe))
    out: Tensor = _embedding_fwd(idx.contiguous(), wte, wpe, given, key, dropout_p, dtype)
    return out
