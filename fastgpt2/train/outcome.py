"""How a run ended."""

from dataclasses import dataclass

from fastgpt2.train.validation import Validation


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    tokens: int
    elapsed: float
    train_loss: float
    validation: Validation | None
    best_step: int
    exit_code: int
    drawn: bool
