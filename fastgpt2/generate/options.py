"""How a text is generated, by flags or in a line of JSON, and the processors for that."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from fastgpt2.config import unknown_key
from fastgpt2.errors import UserError
from fastgpt2.generate.processors import (
    FrequencyPenalty,
    LogitBias,
    MinLength,
    MinP,
    NoRepeatNgram,
    PresencePenalty,
    Processor,
    RepetitionPenalty,
    TopP,
    Typical,
    is_count,
    is_number,
    require,
)
from fastgpt2.generate.sampling import Sampling

DEFAULT_TEMPERATURE = 0.8
# by the option that gives its value, in transformers' order: the bias, penalties, and then those
# that keep likely tokens
_PROCESSORS: dict[str, Any] = {
    "logit_bias": LogitBias,
    "repetition_penalty": RepetitionPenalty,
    "presence_penalty": PresencePenalty,
    "frequency_penalty": FrequencyPenalty,
    "no_repeat_ngram": NoRepeatNgram,
    "top_p": TopP,
    "min_p": MinP,
    "typical": Typical,
}
# options without a meaning where no token is drawn
_DRAWING = ("top_k", "top_p", "min_p", "typical")


@dataclass(frozen=True)
class Options:
    """How a text is generated.

    Attributes:
        max_new_tokens: the most tokens that follow.
        min_new_tokens: tokens to write before a stop id is allowed.
        temperature: below 1 sharper, above 1 flatter; 0 is greedy; None means 0.8.
        top_k, top_p, min_p, typical: the part of the distribution that tokens are drawn from.
        repetition_penalty, presence_penalty, frequency_penalty: against tokens of the text so far.
        no_repeat_ngram: an n-gram of this length occurs only once.
        logit_bias: token id -> what is added to its logit.
        stop: strings and token ids that end the text.
        seed: seed of the text's random numbers; None means the command's.
        samples: texts per prompt.
        best_of: write so many texts and keep the one with the highest log-probability per token.
        num_beams: texts that beam search follows at once; 1 means no beam search.
        length_penalty: for beams: above 0 favours long texts, below 0 short ones.
        early_stopping: for beams: end as soon as ``num_beams`` texts have ended.
    """

    max_new_tokens: int = 200
    min_new_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram: int | None = None
    logit_bias: Mapping[int, float] | None = None
    stop: tuple[str | int, ...] = ()
    seed: int | None = None
    samples: int = 1
    best_of: int = 1
    num_beams: int = 1
    length_penalty: float | None = None
    early_stopping: bool = False

    def replaced(self, values: Mapping[str, Any]) -> Self:
        """These options with some replaced, as in a line of JSON or by flags; all are checked.

        Args:
            values: new values by name; None means the default.

        Raises:
            UserError: a name is unknown, a value is not in its range, or two exclude each other.
        """
        defaults = {field.name: field.default for field in fields(self)}
        new = dict(values)
        for key, value in values.items():
            if key not in defaults:
                raise unknown_key(key, ["prompt", "ids", "id", *defaults], "request")
            if value is None:
                new[key] = defaults[key]
            elif key == "stop":
                new[key] = _stops(value)
            elif key == "logit_bias":
                new[key] = _bias(value)
        options = replace(self, **new)
        options._check()
        return options

    @property
    def sampling(self) -> Sampling:
        """How each token is chosen, without the minimum length."""
        return Sampling(self.drawn_temperature, self.top_k, self.processors())

    @property
    def drawn_temperature(self) -> float:
        """The temperature, or the default one; beams draw nothing."""
        if self.num_beams > 1:
            return 0.0
        return DEFAULT_TEMPERATURE if self.temperature is None else self.temperature

    def processors(
        self, prompt_length: int = 0, stop_ids: frozenset[int] = frozenset()
    ) -> tuple[Processor, ...]:
        """The processors for these options.

        Args:
            prompt_length: number of tokens in the prompt.
            stop_ids: ids that end the text, including the vocabulary's own.
        """
        made: list[Processor] = [
            make(value)
            for name, make in _PROCESSORS.items()
            if (value := getattr(self, name)) is not None
        ]
        if self.min_new_tokens and stop_ids:
            made.append(MinLength(prompt_length + self.min_new_tokens, stop_ids))
        return tuple(made)

    def _check(self) -> None:
        for names, least in (
            (("max_new_tokens", "min_new_tokens"), 0),
            (("samples", "best_of", "num_beams"), 1),
        ):
            for name in names:
                value = getattr(self, name)
                require(name, value, is_count(value, least), f"an integer of {least} or more")
        if self.seed is not None:
            # headroom, so that seed + number of the sample stays valid for PyTorch
            fine = is_count(self.seed, 0) and self.seed < 2**62
            require("seed", self.seed, fine, "an integer in [0, 2^62)")
        if self.length_penalty is not None:
            fine = is_number(self.length_penalty) and abs(self.length_penalty) <= 30
            require("length_penalty", self.length_penalty, fine, "in [-30, 30]")
        if not isinstance(self.early_stopping, bool):
            raise UserError(
                f"early_stopping must be true or false, got {self.early_stopping!r:.80}"
            )
        # ranges of the rest
        _ = self.sampling
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens ({self.min_new_tokens}) is more than max_new_tokens "
                f"({self.max_new_tokens})"
            )
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        if self.num_beams == 1:
            if self.length_penalty is not None or self.early_stopping:
                raise UserError("length_penalty and early_stopping are for beams; give num_beams")
            if self.best_of > 1 and self.temperature == 0:
                raise UserError("best_of: greedy decoding writes the same text each time")
            return
        drawing = [name for name in _DRAWING if getattr(self, name) is not None]
        if self.temperature not in (None, 0):
            drawing.append("temperature")
        if self.best_of > 1:
            drawing.append("best_of")
        if drawing:
            raise UserError(f"num_beams: beams draw nothing, so they take no {drawing[0]}")
        if self.samples > self.num_beams:
            raise UserError(
                f"samples: {self.num_beams} beams end as {self.num_beams} texts, got {self.samples}"
            )


def _stops(value: Any) -> tuple[str | int, ...]:
    stops = list(value) if isinstance(value, list | tuple) else [value]
    for stop in stops:
        if isinstance(stop, bool) or not isinstance(stop, str | int):
            raise UserError(f"stop: expected strings and token ids, got {stop!r:.80}")
    return tuple(stops)


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise UserError(f"logit_bias must map token ids to numbers, got {value!r:.80}")
    try:
        # the keys of a JSON object are strings
        return {int(id_): bias for id_, bias in value.items()}
    except (TypeError, ValueError):
        raise UserError(f"logit_bias must map token ids to numbers, got {value!r:.80}") from None
