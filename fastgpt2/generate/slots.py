"""The rows of a key/value cache, by number: fed, cut, copied, reordered."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt2.model import GPT
from fastgpt2.plain import execution_device


class Slots:
    """``count`` rows of ``size`` tokens, each with a length of its own.

    Args:
        model: whose keys and values they hold.
        count: rows.
        size: tokens of a row, at most block_size.

    Attributes:
        lengths: tokens in each row.
    """

    def __init__(self, model: GPT, count: int, size: int) -> None:
        self.model, self.size = model, size
        self.device = execution_device(model.transformer.wpe)
        self.cache = model.make_cache(count, size)
        self.lengths = [0] * count

    def feed(self, first: int, tokens: Sequence[Sequence[int]], *, every: bool = False) -> Tensor:
        """Append ``tokens[i]`` to row ``first + i``, for neighbouring rows in one pass.

        Args:
            first: the first row.
            tokens: for each row 1 or more token ids. A row needs room for as many tokens as the
                longest list has.
            every: return the logits after every token, not only after each row's last one.

        Returns:
            (rows, V), or (rows, T, V); what follows a row's own tokens is garbage.
        """
        counts = [len(ids) for ids in tokens]
        T, stop = max(counts), first + len(tokens)
        padded = [[*ids, *[0] * (T - len(ids))] for ids in tokens]
        idx = torch.tensor(padded, dtype=torch.int64, device=self.device)
        rows = self.cache.rows(first, stop, is_empty=not any(self.lengths[first:stop]))
        hidden = self.model.hidden_states(idx, rows)
        for i, count in enumerate(counts):
            self.lengths[first + i] += count
        self._write(first, stop)
        if not every:
            last = torch.tensor(counts, device=self.device) - 1
            hidden = hidden[torch.arange(len(counts), device=self.device), last]
        return self.model.head(hidden)

    def cut(self, lengths: Sequence[int], first: int = 0) -> None:
        """Keep the first ``lengths[i]`` tokens of row ``first + i``."""
        stop = first + len(lengths)
        if self.lengths[first:stop] != list(lengths):
            self.lengths[first:stop] = lengths
            self._write(first, stop)

    def copy(self, source: int, target: int) -> None:
        """Row ``target`` becomes what row ``source`` is."""
        self.cache.copy_row(source, target)
        self.lengths[target] = self.lengths[source]

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was, for the first rows of the cache."""
        if list(rows) != list(range(len(rows))):
            self.cache.reorder(torch.tensor(rows, device=self.device))
            self.lengths[: len(rows)] = [self.lengths[row] for row in rows]

    def _write(self, first: int, stop: int) -> None:
        lengths = torch.tensor(self.lengths[first:stop], device=self.device)
        self.cache.lengths[first:stop] = lengths
