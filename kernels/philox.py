"""Counter-based random numbers for dropout: the same mask on every implementation.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) as Triton's
``tl.randint4x(seed, counter)`` computes it: key = the seed's two 32-bit halves, counter = (low,
high, 0, 0), four words out. Written here in int64 tensor arithmetic, where the low 64 bits of a
product are exact.

The mask of a tensor (..., W): with r the number of a row, element (r, w) belongs to word w mod 4 of
counter r ceil(W / 4) + floor(w / 4), and is kept if that word is at least p 2^32.
"""

import math

import torch
from torch import Tensor

ROUNDS = 10
_MASK32 = 0xFFFFFFFF
_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed in [0, 2^62), an int64 scalar tensor from the device's own generator."""
    return torch.randint(2**62, (), dtype=torch.int64, device=device)


def as_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as an int64 scalar tensor on ``device``; a fresh one where there is none."""
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, Tensor):
        return seed.to(device=device, dtype=torch.int64)
    return torch.full((), seed, dtype=torch.int64, device=device)


def words(seed: Tensor, counters: Tensor) -> Tensor:
    """The four 32-bit words of every int64 counter, keyed by ``seed``: (..., 4), in int64."""
    c0, c1 = counters & _MASK32, (counters >> 32) & _MASK32
    c2 = c3 = torch.zeros_like(c0)
    key_a, key_b = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(ROUNDS):
        product_a, product_b = c0 * _MULTIPLIER_A, c2 * _MULTIPLIER_B
        c0 = ((product_b >> 32) & _MASK32) ^ c1 ^ key_a
        c2 = ((product_a >> 32) & _MASK32) ^ c3 ^ key_b
        c1, c3 = product_b & _MASK32, product_a & _MASK32
        key_a, key_b = (key_a + _WEYL_A) & _MASK32, (key_b + _WEYL_B) & _MASK32
    return torch.stack((c0, c1, c2, c3), -1)


def threshold(p: float) -> int:
    """Words below this are dropped: p 2^32, with p rounded to fp32 as in a kernel."""
    return min(int(float(torch.tensor(p, dtype=torch.float32)) * 2**32), _MASK32)


def keep_rows(seed: Tensor, rows: Tensor, width: int, p: float) -> Tensor:
    """(len(rows), width) bool: where dropout keeps an element of these rows."""
    groups = -(-width // 4)
    counters = rows[:, None] * groups + torch.arange(groups, device=rows.device)
    return words(seed, counters).flatten(1)[:, :width] >= threshold(p)


def keep_mask(seed: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    """True where dropout keeps an element of a tensor (..., W) of this shape."""
    rows = torch.arange(math.prod(shape[:-1]), dtype=torch.int64, device=seed.device)
    return keep_rows(seed, rows, shape[-1], p).view(shape)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """``x`` with each element kept with probability 1 - p and multiplied by 1 / (1 - p)."""
    return torch.where(keep_mask(seed, tuple(x.shape), p), x * (1.0 / (1.0 - p)), 0.0)
