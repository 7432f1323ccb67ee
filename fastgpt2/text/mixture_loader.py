"""Batches of a mixture: which source each block of the stream comes from."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgpt2.text.loaders import BlockLoader, BlockStream
from fastgpt2.text.mixture import Mixture
from fastgpt2.text.stored import TokenSequence

# places are drawn as integers below this number
_RANGE = 1 << 32
# nearest odd number to _RANGE / golden ratio: its multiples spread most evenly (Weyl, 1916)
_STEP = 2654435769


def open_loader(tokens: TokenSequence, **options: Any) -> BlockStream:
    """The stream of one corpus or of a mixture.

    Args:
        tokens: the corpus or mixture.
        options: arguments of ``BlockLoader``.
    """
    if isinstance(tokens, Mixture):
        return MixtureLoader(tokens, **options)
    return BlockLoader(tokens, **options)


def mixture_lines(loader: BlockStream, blocks: int) -> list[str]:
    """The share and the epochs of each source of a mixture, one line each; none for one corpus.

    Args:
        loader: the stream.
        blocks: number of blocks taken from it in total.
    """
    if not isinstance(loader, MixtureLoader):
        return []
    mixture = loader.mixture
    columns = zip(mixture.names, mixture.weights, loader.epochs_of(blocks), strict=True)
    return [
        f"mixture: {name}: {weight:.1%} of the blocks, {epochs:.3g} epochs of it"
        for name, weight, epochs in columns
    ]


class MixtureLoader(BlockStream):
    """The stream of a mixture: it chooses the source and the block for each place.

    Each source owns a part of [0, 1) as long as its weight. The fractional part of u + p / golden
    ratio (Weyl's sequence, u from the seed) decides which source place p belongs to. Among any n
    consecutive places, each source has its share of n to within a few. A source's blocks come in
    the order of its own ``BlockLoader``, each once per epoch of that source. The number of places
    below p that belong to a source is a sum of floors, computed in O(log p): the state stays one
    number, as for one corpus.

    An epoch of the mixture has as many blocks as all sources together.

    Args:
        mixture: sources and weights.
        block_size, batch_size, seed, rank, world_size, name: as for ``BlockLoader``.
        eot: as for ``BlockLoader``.
        options: further arguments of each source's ``BlockLoader``.

    Raises:
        UserError: a source has fewer than T + 1 tokens, or an id outside the vocabulary.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        block_size: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        eot: int | None = None,
        name: str = "training tokens",
        **options: Any,
    ) -> None:
        self.mixture = mixture
        self.sources = [
            BlockLoader(
                tokens,
                block_size=block_size,
                batch_size=batch_size,
                # each source has its own order
                seed=int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]),
                name=f"{name} of {source}",
                **options,
            )
            for number, (source, tokens) in enumerate(
                zip(mixture.names, mixture.tokens, strict=True)
            )
        ]
        blocks_per_epoch = sum(source.blocks_per_epoch for source in self.sources)
        super().__init__(block_size, batch_size, blocks_per_epoch, rank, world_size, eot)
        self._seed = seed
        self._offset = int(np.random.SeedSequence([seed]).generate_state(1)[0])
        # where the share of each source ends
        ends = np.round(np.cumsum(mixture.weights) * _RANGE).astype(np.int64)
        ends[-1] = _RANGE
        self._ends: list[int] = ends.tolist()

    def blocks(self, first: int, count: int) -> NDArray[Any]:
        """``count`` blocks from place ``first`` of the stream on, (count, T + 1)."""
        chosen = self._sources_at(first, count)
        out = np.empty((count, self.block_size + 1), np.int64)
        for number, (source, before) in enumerate(
            zip(self.sources, self.blocks_of(first), strict=True)
        ):
            mine = chosen == number
            if mine.any():
                out[mine] = source.blocks(before, int(mine.sum()))
        return out

    def _sources_at(self, first: int, count: int) -> NDArray[np.int64]:
        """The number of the source at each of these places."""
        drawn = (self._offset + _STEP * np.arange(first, first + count, dtype=np.uint64)) % _RANGE
        return np.searchsorted(self._ends, drawn, side="right")

    def blocks_of(self, place: int) -> list[int]:
        """How many of the first ``place`` blocks of the stream come from each source."""
        below = [self._drawn_below(end, place) for end in self._ends]
        return [end - begin for begin, end in zip([0, *below], below, strict=False)]

    def _drawn_below(self, end: int, count: int) -> int:
        """How many of the first ``count`` drawn numbers lie below ``end``."""
        # x % m < e exactly if floor(x / m) exceeds floor((x - e) / m), for 0 < e <= m
        return _floor_sum(count, _RANGE, _STEP, self._offset) - _floor_sum(
            count, _RANGE, _STEP, self._offset - end
        )

    def epochs_of(self, place: int) -> list[float]:
        """Passes over each source in the first ``place`` blocks of the stream."""
        used = zip(self.blocks_of(place), self.sources, strict=True)
        return [blocks / source.blocks_per_epoch for blocks, source in used]

    def state_dict(self) -> dict[str, int]:
        """The place in the stream, and what it is only valid for; plain integers."""
        return {
            "position": self._position,
            "seed": self._seed,
            "block_size": self.block_size,
            "num_tokens": len(self.mixture),
            **{f"weight_{number}": end for number, end in enumerate(self._ends)},
        }


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Sum of floor((a i + b) / m) over 0 <= i < n, by Euclid's algorithm (Knuth, 1.2.4)."""
    total = 0
    while n > 0:
        total += (a // m) * (n * (n - 1) // 2) + (b // m) * n
        a, b = a % m, b % m
        last = a * n + b
        n, m, a, b = last // m, a, m, last % m
    return total
