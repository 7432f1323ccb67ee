"""Cross-entropy over a text: the mean, the curve over positions, the worst tokens."""

import heapq
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from fastgpt2 import distributed, units
from fastgpt2.evaluate.bars import progress
from fastgpt2.evaluate.data import Text
from fastgpt2.evaluate.scoring import TokenScores, score
from fastgpt2.evaluate.windows import Windows, make_batch
from fastgpt2.model import GPT

CALIBRATION_BINS = 10
WORST_TOKENS = 10
# tokens of text shown before a badly predicted one
_SHOWN_BEFORE = 40


@dataclass(frozen=True)
class WorstToken:
    """A token the model did not expect: its loss in nats and the text before it."""

    nll: float
    place: int
    before: str
    token: str


@dataclass(frozen=True)
class TextScore:
    """A model's score on a text.

    Arrays: ``position`` (3, context - 1) has count, sum and sum of squares of the losses by the
    number of tokens read before; ``calibration`` (3, bins) has count, sum of the confidence and
    number of hits of the likeliest token, by that confidence.
    """

    tokens: int
    tokens_scored: int
    bytes_scored: int
    words: int | None
    loss: float
    context: int
    stride: int
    position: NDArray[np.float64] = field(repr=False)
    calibration: NDArray[np.float64] = field(repr=False)
    worst: tuple[WorstToken, ...] = field(repr=False)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return units.perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits of the scored tokens over their UTF-8 bytes: comparable between tokenizers."""
        if not self.bytes_scored:
            return math.inf
        return self.loss * self.tokens_scored / self.bytes_scored / math.log(2)

    @property
    def word_perplexity(self) -> float | None:
        """exp(loss * tokens / words): perplexity per word of the original text."""
        return units.perplexity(self.loss * self.tokens / self.words) if self.words else None

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of the likeliest token (Guo et al., 2017), 0 to 1."""
        count, confidence, correct = self.calibration
        return float(np.abs(confidence - correct).sum() / count.sum())


class _Tally:
    """Sums over the scored tokens that this process has seen."""

    def __init__(self, context: int) -> None:
        self.position = np.zeros((3, context - 1))
        self.calibration = np.zeros((3, CALIBRATION_BINS))
        self.bytes = np.zeros(1)
        # the largest losses as (nll, place)
        self.worst: list[tuple[float, int]] = []

    def add(
        self, scores: TokenScores, position: NDArray[np.int64], place: NDArray[np.int64]
    ) -> None:
        """Add tokens, each with its position in the window and its place in the text."""
        one = np.ones_like(scores.nll)
        columns = (one, scores.nll, scores.nll**2)
        self.position += _sums(position, columns, self.position.shape[1])
        bins = (scores.confidence * CALIBRATION_BINS).astype(np.int64).clip(0, CALIBRATION_BINS - 1)
        columns = (one, scores.confidence, scores.correct.astype(np.float64))
        self.calibration += _sums(bins, columns, CALIBRATION_BINS)
        top = np.argsort(scores.nll)[-WORST_TOKENS:]
        found = zip(scores.nll[top].tolist(), place[top].tolist(), strict=True)
        self.worst = heapq.nlargest(WORST_TOKENS, [*self.worst, *found])

    def reduce(self) -> None:
        """Sum over all processes."""
        self.position, self.calibration, self.bytes = (
            distributed.all_sum(x) for x in (self.position, self.calibration, self.bytes)
        )
        self.worst = heapq.nlargest(WORST_TOKENS, distributed.gather(self.worst))


def _sums(
    index: NDArray[np.int64], columns: tuple[NDArray[np.float64], ...], size: int
) -> NDArray[np.float64]:
    """Sum of each column over the rows with the same index, (columns, size)."""
    return np.stack([np.bincount(index, column, size) for column in columns])


def score_text(
    model: GPT, text: Text, windows: Windows, *, batch_size: int, dtype: torch.dtype
) -> TextScore:
    """Mean of -log p(token | the tokens before it in its window) over the tokens of a text.

    Losses are summed in fp64. With several processes, each scores its share of the batches and all
    return the same result.

    Args:
        model: in evaluation mode.
        text: the tokens.
        windows: the windows over ``text.tokens``.
        batch_size: windows per batch.
        dtype: compute dtype.

    Raises:
        UserError: a loss is not finite.
    """
    token_bytes = text.token_bytes()
    tally = _Tally(windows.context)
    starts = distributed.share(len(windows), batch_size)
    for start in progress(starts, "scoring", "batch"):
        batch = [windows[k] for k in range(start, min(start + batch_size, len(windows)))]
        idx, targets = make_batch(text.tokens, batch)
        scores = score(model, idx, targets, dtype)
        row, position = np.nonzero(targets.numpy() >= 0)
        place = np.array([window.begin for window in batch])[row] + position + 1
        tally.add(scores, position, place)
        tally.bytes += token_bytes[targets.numpy()[row, position]].sum()
    tally.reduce()
    count, total, _ = tally.position.sum(axis=1)
    return TextScore(
        tokens=len(text.tokens),
        tokens_scored=int(count),
        bytes_scored=int(tally.bytes[0]),
        words=text.words,
        loss=float(total / count),
        context=windows.context,
        stride=windows.stride,
        position=tally.position,
        calibration=tally.calibration,
        worst=tuple(_shown(text, nll, place) for nll, place in tally.worst),
    )


def _shown(text: Text, nll: float, place: int) -> WorstToken:
    start = max(0, place - _SHOWN_BEFORE)
    ids = text.tokens[start : place + 1].tolist()
    decode = text.tokenizer.decode
    return WorstToken(nll, place, decode(ids[:-1]), decode(ids[-1:]))
