"""Token embedding plus position embedding, with dropout."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks, philox, reference
from fastgpt2.kernels.backend import Impl, resolve


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
    checks.check_dropout(op, dropout_p)
    T = idx.shape[1]
    if positions is None:
        if wpe.shape[0] < T:
            raise ValueError(f"{op}: {T} tokens, but wpe has only {wpe.shape[0]} positions")
        positions = torch.arange(T, device=idx.device)
    else:
        checks.check_integer(op, "positions", positions)
        expected = tuple(idx.shape)[-positions.dim() :]
        checks.check_shape(op, "positions", positions, expected, f"idx {tuple(idx.shape)}")
    dtype = wte.dtype if dtype is None else dtype
    match resolve(op, impl, wte):
        case Impl.REFERENCE:
            key = philox.as_seed(seed, wte.device) if dropout_p > 0 else None
            return reference.embedding(idx, wte, wpe, positions, dropout_p, key, dtype)
        case Impl.TORCH:
            x = F.embedding(idx, wte) + F.embedding(positions, wpe)
            if dropout_p > 0 and seed is None:
                x = F.dropout(x, dropout_p)
            elif dropout_p > 0:
                x = philox.dropout(x, dropout_p, philox.as_seed(seed, wte.device))
            return x.to(dtype)
    raise RuntimeError("embedding: impl='triton' is not built yet")
