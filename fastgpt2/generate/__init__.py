"""``python -m fastgpt2.generate``: text out of a model; ``__main__`` is the command.

>>> from fastgpt2.generate import Generator, MinP, TopP
>>> model.generate(idx, 50, processors=[TopP(0.9), MinP(0.05)])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt2.generate.generator import Generator
    from fastgpt2.generate.processors import (
        FrequencyPenalty,
        LogitBias,
        MinLength,
        MinP,
        NoRepeatNgram,
        PresencePenalty,
        RepetitionPenalty,
        Temperature,
        TopK,
        TopP,
        Typical,
    )

# public name -> module that defines it; imported on first use (PEP 562)
_LAZY = {
    "FrequencyPenalty": "processors",
    "Generator": "generator",
    "LogitBias": "processors",
    "MinLength": "processors",
    "MinP": "processors",
    "NoRepeatNgram": "processors",
    "PresencePenalty": "processors",
    "RepetitionPenalty": "processors",
    "Temperature": "processors",
    "TopK": "processors",
    "TopP": "processors",
    "Typical": "processors",
}

__all__ = [
    "FrequencyPenalty",
    "Generator",
    "LogitBias",
    "MinLength",
    "MinP",
    "NoRepeatNgram",
    "PresencePenalty",
    "RepetitionPenalty",
    "Temperature",
    "TopK",
    "TopP",
    "Typical",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
