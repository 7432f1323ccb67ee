"""One request: what the caller wants, its result so far, and the pieces as they are written."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fastgpt2.generate.sampling import Sampling
from fastgpt2.generate.text import TextPieces


@dataclass(frozen=True)
class Request:
    """What a caller wants.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: the most that follow.
        sampling: how each token is chosen.
        stop: ids that end the text; they are not part of it.
        generator: source of randomness, shared by all rows that name the same one.
        log_probs: whether the tokens' log-probabilities are kept.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    stop: frozenset[int]
    generator: torch.Generator
    log_probs: bool


class Stream:
    """The continuation of one prompt; iterate over it to get the pieces as they are written.

    A piece is text if the prompt was text, and a token id if it was ids. Iterating also advances
    every other request of the generator.

    Attributes:
        request: the request.
        ids: the token ids written so far.
        text: the text written so far, if the prompt was text; it ends before a stop string, though
            ``ids`` holds the tokens that completed it.
        log_probs: log-probability of each id in nats, under the model itself: before temperature
            and processors.
        finish_reason: ``length`` (max_new_tokens), ``stop`` (a stop id or string), ``window`` (the
            window is full and does not slide), ``no token left`` (every one is forbidden),
            ``cancelled``, ``error``, or None while it goes on.
        error: what ended it with ``error``; iterating and ``wait`` raise it.
        start: index in prompt and ``ids`` at which the model's context begins, once it has ended.
    """

    def __init__(
        self,
        request: Request,
        pieces: TextPieces | None,
        advance: Callable[[], bool],
        start: int = 0,
    ) -> None:
        self.request, self.start = request, start
        self.ids: list[int] = []
        self.text = ""
        self.log_probs: list[float] = []
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self._pieces, self._advance = pieces, advance
        # the log-probability of the stop id
        self._end: float | None = None
        self._queue: deque[str | int] = deque()

    def __iter__(self) -> Iterator[str | int]:
        while True:
            while self._queue:
                yield self._queue.popleft()
            if self.finish_reason is not None:
                self.check()
                return
            self._advance()

    @property
    def score(self) -> float:
        """The mean log-probability of the tokens so far, the stop id that ended them included."""
        values = self.log_probs if self._end is None else [*self.log_probs, self._end]
        return sum(values) / max(1, len(values))

    def wait(self) -> "Stream":
        """Run until this request is finished, and return it."""
        while self.finish_reason is None:
            self._advance()
        self.check()
        return self

    def check(self) -> None:
        """Raise the error that has ended the request, if one has."""
        if self.error is not None:
            raise self.error

    def poll(self) -> list[str | int]:
        """The pieces since the last call, without waiting for more."""
        pieces = list(self._queue)
        self._queue.clear()
        return pieces

    def cancel(self) -> None:
        """End the request; its row becomes free."""
        self._finish("cancelled")

    def _fail(self, error: Exception) -> None:
        if self.finish_reason is None:
            self.error = error
            self._finish("error")

    def _finish(self, reason: str) -> None:
        if self.finish_reason is not None:
            return
        self.finish_reason = reason
        if self._pieces is not None:
            self._show(self._pieces.finish())

    def _push(self, id_: int, log_prob: float | None) -> None:
        """One more token, which may be the last."""
        if id_ in self.request.stop:
            self._end = log_prob
            self._finish("stop")
            return
        self.ids.append(id_)
        if log_prob is not None:
            self.log_probs.append(log_prob)
        if self._pieces is None:
            self._queue.append(id_)
        else:
            self._show(self._pieces.push(id_))
            if self._pieces.stopped:
                self._finish("stop")
        if len(self.ids) >= self.request.max_new_tokens:
            self._finish("length")

    def _show(self, piece: str) -> None:
        self.text += piece
        if piece:
            self._queue.append(piece)


def likeliest(streams: Sequence[Stream]) -> Stream:
    """The ended stream with the highest log-probability per token; the first of equal ones.

    Args:
        streams: at least one; if there are several, with their log-probabilities.
    """
    if len(streams) == 1:
        return streams[0]
    return max(streams, key=lambda stream: stream.score)
