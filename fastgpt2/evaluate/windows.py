"""Sliding windows over a token sequence: which tokens are read and which are scored.

The windows are those of transformers' recipe ("Perplexity of fixed-length models"): window k holds
the tokens from k * stride on, at most ``context`` of them, and scores those that no window before
it has held. Its last token is only predicted. The first token of a window is never scored, since
nothing in the window comes before it. With stride < context this concerns only the first token of
the text, with stride = context one token in each window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgpt2.errors import UserError
from fastgpt2.text.packing import IGNORE_INDEX
from fastgpt2.text.stored import TokenSequence


class Window(NamedTuple):
    """Tokens [begin, end), of which [first, end) are scored."""

    begin: int
    first: int
    end: int


@dataclass(frozen=True)
class Windows:
    """The windows over ``length`` tokens, by number, for a model of ``block_size``.

    Raises:
        UserError: fewer than two tokens, a context outside [2, block_size + 1], or a stride
            outside [1, context].
    """

    length: int
    context: int
    stride: int
    block_size: int

    def __post_init__(self) -> None:
        if not 2 <= self.context <= self.block_size + 1:
            raise UserError(
                f"--context must be in [2, {self.block_size + 1}], up to the model's block_size "
                f"and a token that is only predicted, got {self.context}"
            )
        if not 1 <= self.stride <= self.context:
            raise UserError(
                f"--stride must be in [1, {self.context}], the context, got {self.stride}"
            )
        if self.length < 2:
            raise UserError(f"data: {self.length} tokens, at least 2 are needed")

    def __len__(self) -> int:
        count = 1 + -(-max(0, self.length - self.context) // self.stride)
        # with stride = context, one token may be left over at the end: it has nothing before it
        last = self[count - 1]
        return count - (last.first == last.end)

    def __getitem__(self, k: int) -> Window:
        begin = k * self.stride
        end = min(begin + self.context, self.length)
        scored_before = begin - self.stride + self.context if k else 0
        return Window(begin, max(scored_before, begin + 1), end)


def make_batch(tokens: TokenSequence, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) of some windows; targets are -100 where nothing is scored.

    Shorter windows are padded at the end, which a causal model ignores.
    """
    T = max(window.end - window.begin for window in windows) - 1
    idx = torch.zeros(len(windows), T, dtype=torch.int64)
    targets = torch.full_like(idx, IGNORE_INDEX)
    for row, (begin, first, end) in enumerate(windows):
        ids = torch.from_numpy(tokens[begin:end].astype(np.int64))
        idx[row, : len(ids) - 1] = ids[:-1]
        targets[row, first - begin - 1 : len(ids) - 1] = ids[first - begin :]
    return idx, targets
