"""Logit processors: small callables ``(ids, logits) -> logits`` that shape what is drawn.

Each takes the token ids so far, (B, T) int64, and the next token's logits, (B, V) fp32, and returns
new logits; a token that must not be drawn gets -inf. Any function with this signature is a
processor. Those with ``warps = True`` cut the tail of the distribution: they run after the
temperature, and greedy decoding skips them. All others run before it. With ``reads_ids = False``,
rows of unequal length can share a call.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgpt2.devices import device_kind
from fastgpt2.errors import UserError

Processor = Callable[[Tensor, Tensor], Tensor]


def require(name: str, value: float, fine: bool, expected: str) -> None:
    """Raise a ``UserError`` that names the option and what was expected, unless ``fine``."""
    if isinstance(value, bool) or not fine:
        raise UserError(f"{name} must be {expected}, got {value!r:.80}")


def plain(value: Any) -> Any:
    """A number of NumPy's, or a tensor without dimensions, as Python's; all else as it is."""
    is_scalar = isinstance(value, np.generic) or (isinstance(value, Tensor) and not value.dim())
    return value.item() if is_scalar else value


def is_number(value: object) -> bool:
    """Whether ``value`` is a number that fp32 can compute with: within 1e30."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e30


def is_count(value: Any, least: int) -> bool:
    """Whether ``value`` is an integer of ``least`` or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


class _Options:
    """A dataclass whose numbers are Python's, whatever kind of number they were given as."""

    def __post_init__(self) -> None:
        options: Any = self
        for field in fields(options):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))


@dataclass(frozen=True)
class Temperature(_Options):
    """logits / temperature, with the largest at 0; at 0 only the best token is left.

    Raises:
        UserError: the temperature is negative or not finite.
    """

    temperature: float
    warps = True
    reads_ids = False

    def __post_init__(self) -> None:
        super().__post_init__()
        fine = is_number(self.temperature) and self.temperature >= 0
        require("temperature", self.temperature, fine, "0 or more")

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Scores ``logits`` (B, V) of the token after ``ids`` (B, T), changed as said above."""
        # if every token is forbidden, it stays so
        best = logits.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
        if self.temperature == 0:
            return logits.masked_fill(logits < best, -torch.inf)
        # with the largest at 0, a temperature near 0 makes the others -inf and none NaN, unless it
        # rounds to 0 in fp32
        return (logits - best) / max(float(self.temperature), 1e-30)


@dataclass(frozen=True)
class TopK(_Options):
    """Keep the k most likely tokens, and those equal to the k-th (Fan et al., 2018).

    Raises:
        UserError: k is not an integer of 1 or more.
    """

    k: int
    warps = True
    reads_ids = False

    def __post_init__(self) -> None:
        super().__post_init__()
        fine = is_count(self.k, 1)
        require("top_k", self.k, fine, "an integer of 1 or more")

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Scores ``logits`` (B, V) of the token after ``ids`` (B, T), changed as said above."""
        if self.k >= logits.shape[-1]:
            return logits
        kth_best = logits.topk(self.k, dim=-1).values[:, -1:]
        return logits.masked_fill(logits < kth_best, -torch.inf)


# in most contexts, so many tokens reach p
_LIKELIEST = 4096


@dataclass(frozen=True)
class TopP(_Options):
    """Keep the smallest set of likely tokens whose probability reaches p (Holtzman et al., 2020).

    The most likely token is always kept.

    Raises:
        UserError: p is outside [0, 1].
    """

    p: float
    warps = True
    reads_ids = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require("top_p", self.p, is_number(self.p) and 0 <= self.p <= 1, "in [0, 1]")

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Scores ``logits`` (B, V) of the token after ``ids`` (B, T), changed as said above."""
        # sorting GPT-2's vocabulary takes a processor 5 ms, finding its likeliest tokens 1
        pays = logits.shape[-1] > _LIKELIEST and device_kind(logits.device).host
        if not pays or logits.dtype != torch.float32:
            return self._sorted(logits)
        best, order = logits.topk(_LIKELIEST, dim=-1)
        probs = logits.softmax(dim=-1).gather(1, order)
        before = probs.cumsum(dim=-1) - probs
        kept = best.masked_fill(before >= self.p, -torch.inf)
        kept[:, 0] = best[:, 0]
        result = torch.full_like(logits, -torch.inf).scatter(1, order, kept)
        # these reach p, however their sum is rounded; each row is decided alone
        enough = before[:, -1:] > self.p + 1e-5
        return result if bool(enough.all()) else torch.where(enough, result, self._sorted(logits))

    def _sorted(self, logits: Tensor) -> Tensor:
        ascending, order = logits.sort(dim=-1)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - self.p
        drop[:, -1] = False
        return logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)


@dataclass(frozen=True)
class MinP(_Options):
    """Keep the tokens at least p times as likely as the best one (Nguyen et al., 2024).

    Raises:
        UserError: p is outside [0, 1].
    """

    p: float
    warps = True
    reads_ids = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require("min_p", self.p, is_number(self.p) and 0 <= self.p <= 1, "in [0, 1]")

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Scores ``logits`` (B, V) of the token after ``ids`` (B, T), changed as said above."""
        probs = logits.softmax(dim=-1)
        return logits.masked_fill(probs < self.p * probs.amax(dim=-1, keepdim=True), -torch.inf)


@dataclass(frozen=True)
class Typical(_Options):
    """Keep the tokens whose surprise is nearest to the entropy, up to the mass p.

    Meister et al., "Locally typical sampling", 2022: sorted by | -log p(x) - H |.

    Raises:
        UserError: p is outside (0, 1].
    """

    p: float
    warps = True
    reads_ids = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require("typical", self.p, is_number(self.p) and 0 < self.p <= 1, "in (0, 1]")

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Scores ``logits`` (B, V) of the token after ``ids`` (B, T), changed as said above."""
        log_probs = logits.log_softmax(dim=-1)
        entropy = -(log_probs * log_probs.exp()).nansum(dim=-1, keepdim=True)
        distance, order = (-log_probs - entropy).abs().sort(dim=-1)
        mass = log_probs.gather(1, order).exp().cumsum(dim=-1)
        # keep the token that reaches the mass, and those as far from the entropy as it is
        last = (mass < self.p).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
        drop = distance > distance.gather(1, last)
        drop[:, 0] = False
        return logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)


@dataclass(frozen=True)
class RepetitionPenalty(_Options):
    """Divide the positive logits of tokens in ``ids`` by the penalty, multiply the negative ones.

    The prompt counts. Keskar et al., "CTRL", 2019.

    Raises:
        UserError: the penalty is not positive.
    """

    penalty: float

    def __post_init__(self) -> None:
        super().__post_init__()
        fine = is_number(self.penalty) and self.penalty >= 1e-30
        require("repetition_penalty", self.penalty, fine, "a positive number")

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Scores ``logits`` (B, V) of the token after ``ids`` (B, T), changed as said above."""
        # a Python integer may not fit into a tensor's dtype
        seen, penalty = logits.gather(1, ids), float(self.penalty)
        return logits.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def _require_ids(name: str, ids: Iterable[int], logits: Tensor) -> None:
    V, largest = logits.shape[-1], max(ids)
    if largest >= V:
        raise UserError(f"{name}: id {largest} is not in [0, {V}), the vocabulary")


def _counts(ids: Tensor, logits: Tensor) -> Tensor:
    """(B, V): how often each token occurs in ``ids``."""
    return torch.zeros_like(logits).scatter_add_(1, ids, torch.ones_like(ids, dtype=logits.dtype))


@dataclass(frozen=True)
class PresencePenalty(_Options):
    """Subtract the penalty from the logit of every token in ``ids``, the prompt included.

    Raises:
        UserError: the penalty is not finite.
    """

    penalty: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require("presence_penalty", self.penalty, is_number(self.penalty), "a finite number")

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Scores ``logits`` (B, V) of the token after ``ids`` (B, T), changed as said above."""
        return logits - float(self.penalty) * _counts(ids, logits).clamp(max=1.0)


@dataclass(frozen=True)
class FrequencyPenalty(_Options):
    """Subtract the penalty once for each time the token occurs in ``ids``, the prompt included.

    Raises:
        UserError: the penalty is not finite.
    """

    penalty: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require("frequency_penalty", self.penalty, is_number(self.penalty), "a finite number")

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Scores ``logits`` (B, V) of the token after ``ids`` (B, T), changed as said above."""
        return logits - float(self.penalty) * _counts(ids, logits)


@dataclass(frozen=True)
class NoRepeatNgram(_Options):
    """Forbid every token that would complete an n-gram that already occurs in ``ids``.

    Raises:
        UserError: n is not an integer of 1 or more.
    """

    n: int

    def __post_init__(self) -> None:
        super().__post_init__()
        fine = is_count(self.n, 1)
        require("no_repeat_ngram", self.n, fine, "an integer of 1 or more")

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Scores ``logits`` (B, V) of the token after ``ids`` (B, T), changed as said above."""
        n, T = self.n, ids.shape[1]
        if n > T:
            return logits
        # (B, T - n + 1, n), every n-gram so far
        ngrams = ids.unfold(1, n, 1)
        repeated = (ngrams[:, :, :-1] == ids[:, None, T - n + 1 :]).all(dim=-1)
        banned = torch.zeros_like(logits).scatter_add_(1, ngrams[:, :, -1], repeated.to(logits))
        return logits.masked_fill(banned > 0, -torch.inf)


@dataclass(frozen=True)
class LogitBias:
    """Add a bias to the logits of single tokens; -inf forbids one.

    Args:
        bias: token id to bias.

    Raises:
        UserError: it is not a mapping, an id is negative, or a bias is NaN or +inf. When it is
            called: an id is not in the vocabulary.
    """

    bias: Mapping[int, float]
    reads_ids = False

    def __post_init__(self) -> None:
        if not isinstance(self.bias, Mapping):
            raise UserError(
                f"logit_bias must be a mapping of token ids to numbers, got {self.bias!r:.80}"
            )
        bias = {plain(id_): plain(value) for id_, value in self.bias.items()}
        object.__setattr__(self, "bias", bias)
        for id_, value in bias.items():
            require("logit_bias: an id", id_, is_count(id_, 0), "0 or more")
            fine = is_number(value) or value == -math.inf
            require(f"logit_bias: the bias of {id_}", value, fine, "a finite number, or -inf")

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Scores ``logits`` (B, V) of the token after ``ids`` (B, T), changed as said above."""
        if not self.bias:
            return logits
        _require_ids("logit_bias", self.bias, logits)
        index = torch.tensor(list(self.bias), device=logits.device)
        biases = [float(value) for value in self.bias.values()]
        values = torch.tensor(biases, device=logits.device, dtype=logits.dtype)
        return logits.index_add(1, index, values.expand(len(logits), -1))


@dataclass(frozen=True)
class InVocabulary:
    """Forbid the ids from ``size`` on, which only pad the vocabulary and have no text.

    Args:
        size: ids of the tokenizer.
    """

    size: int
    reads_ids = False

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Scores ``logits`` (B, V) of the token after ``ids`` (B, T), changed as said above."""
        if self.size >= logits.shape[-1]:
            return logits
        known = logits.clone()
        known[:, self.size :] = -math.inf
        return known


@dataclass(frozen=True)
class MinLength(_Options):
    """Forbid the tokens that end a text until ``ids``, prompt included, is ``length`` long.

    Args:
        length: of the prompt and what follows.
        stop: the ids that end a text, or a single one.

    Raises:
        UserError: the length or an id is not an integer of 0 or more. When it is called: an id is
            not in the vocabulary.
    """

    length: int
    stop: int | Iterable[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        fine = is_count(self.length, 0)
        require("min_length", self.length, fine, "an integer of 0 or more")
        stop = (self.stop,) if isinstance(self.stop, int) else tuple(map(plain, self.stop))
        object.__setattr__(self, "stop", stop)
        for id_ in stop:
            require("min_length: a stop id", id_, is_count(id_, 0), "0 or more")

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Scores ``logits`` (B, V) of the token after ``ids`` (B, T), changed as said above."""
        stop = self.stop
        assert isinstance(stop, tuple)
        if ids.shape[1] >= self.length or not stop:
            return logits
        _require_ids("min_length: stop", stop, logits)
        return logits.index_fill(1, torch.tensor(stop, device=logits.device), -torch.inf)
