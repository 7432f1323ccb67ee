"""Counter-based random numbers for dropout: the same mask on every implementation.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) as Triton's
``tl.rand(seed, offset)`` computes it: key = the seed's two 32-bit halves, counter = (offset low,
offset high, 0, 0), first output word scaled to [0, 1). Written here in int64 tensor arithmetic,
where the low 64 bits of a product are exact.
"""

import torch
from torch import Tensor

ROUNDS = 10
_MASK32 = 0xFFFFFFFF
_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85
# 2^-31 shrunk by one part in 2^25, so that the largest word stays below 1
_WORD_TO_UNIT = 4.6566127342e-10


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


def uniform(seed: Tensor, offsets: Tensor) -> Tensor:
    """One fp32 number in [0, 1) for every int64 offset, keyed by ``seed``."""
    counter = [offsets & _MASK32, (offsets >> 32) & _MASK32]
    c0, c1 = counter[0], counter[1]
    c2 = c3 = torch.zeros_like(c0)
    key_a, key_b = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(ROUNDS):
        product_a, product_b = c0 * _MULTIPLIER_A, c2 * _MULTIPLIER_B
        c0 = ((product_b >> 32) & _MASK32) ^ c1 ^ key_a
        c2 = ((product_a >> 32) & _MASK32) ^ c3 ^ key_b
        c1, c3 = product_b & _MASK32, product_a & _MASK32
        key_a, key_b = (key_a + _WEYL_A) & _MASK32, (key_b + _WEYL_B) & _MASK32
    # the first word as a signed 32-bit integer, folded to [0, 2^31)
    folded = torch.where(c0 >= 2**31, _MASK32 - c0, c0)
    return folded.to(torch.float32) * _WORD_TO_UNIT


def keep_mask(seed: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    """True where dropout keeps an element of a row-major tensor of this shape: ``u >= p``."""
    count = 1
    for size in shape:
        count *= size
    offsets = torch.arange(count, dtype=torch.int64, device=seed.device)
    return (uniform(seed, offsets) >= p).view(shape)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """``x`` with each element kept with probability 1 - p and divided by it."""
    return torch.where(keep_mask(seed, tuple(x.shape), p), x / (1.0 - p), 0.0)
