"""A random order of n things that needs no memory, however large n is."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6


class Permutation:
    """A bijection of [0, n) chosen by ``seed``: a Feistel network with cycle walking.

    x in [0, a * b) is written as the pair (x // b, x % b). Each round adds to either half, modulo a
    or b, a hash of the other half. Each addition can be undone, so the whole is one-to-one. With a
    and b close to the square root of n, few results fall outside [0, n); those are mapped again
    until they are inside. (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.)
    """

    def __init__(self, n: int, *, seed: Sequence[int]) -> None:
        self.n = n
        # halves with fewer than four values would hardly mix
        high = max(4, int(n**0.5))
        self._high, self._low = np.uint64(high), np.uint64(max(4, -(-n // high)))
        words = np.random.SeedSequence(list(seed)).generate_state(2 * ROUNDS + 1, np.uint64)
        self._keys = words[1:].reshape(ROUNDS, 2)
        # one more random number from the same seed, for the caller
        self.extra = int(words[0])

    def __call__(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """The images of ``index``, each in [0, n)."""
        out = self._network(index.astype(np.uint64))
        while (outside := out >= self.n).any():
            out[outside] = self._network(out[outside])
        return out.astype(np.int64)

    def _network(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = x // self._low, x % self._low
        for first, second in self._keys:
            high = (high + _mix(low ^ first) % self._high) % self._high
            low = (low + _mix(high ^ second) % self._low) % self._low
        return high * self._low + low


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # the finalizer of splitmix64 (Steele, Lea and Flood, 2014)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
