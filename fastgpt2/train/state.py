"""The state of a run: what a checkpoint holds, and the way back to the last finished step."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastgpt2 import distributed, runs
from fastgpt2.devices import rng_states, set_rng_states
from fastgpt2.errors import UserError
from fastgpt2.model import GPT
from fastgpt2.text import BlockStream
from fastgpt2.train import checkpoint
from fastgpt2.train.parallel import own
from fastgpt2.train.saver import Saver
from fastgpt2.train.spikes import Spikes
from fastgpt2.train.step import StepResult
from fastgpt2.train.validation import Validation

# bytes of this process's weights: to write these and their moments takes a tenth of a second
_MANY = 2**25


@dataclass
class RunState:
    """Everything that changes while a run trains.

    Args:
        model: the weights.
        optimizer: their moments.
        loader: the position in the training data.
        scaler: fp16's loss scale.
        fixed: what belongs to the run and does not change; stored in each checkpoint, plain JSON.
        step: optimizer steps taken.
        elapsed: seconds of the run until ``step``, evaluations included.
        train_loss: mean loss of the steps between the last two records, nats per token.
        validation: loss of the weights as they are after ``step``; None where it was not measured.
        pending: results of the steps since the last record in the log.
        spikes: the losses that a new one is compared with.
        saver: writes the checkpoints.
    """

    model: GPT
    optimizer: torch.optim.Optimizer
    loader: BlockStream
    scaler: torch.amp.GradScaler
    fixed: dict[str, Any]
    step: int = 0
    elapsed: float = 0.0
    train_loss: float = math.nan
    validation: Validation | None = None
    pending: list[StepResult] = field(default_factory=list)
    spikes: Spikes = field(default_factory=Spikes)
    saver: Saver = field(default_factory=Saver)

    def __post_init__(self) -> None:
        self._device = self.model.lm_head.weight.device
        self.mark()

    @property
    def tokens(self) -> int:
        """Targets trained on, over all processes, whatever the batch size was."""
        return self.loader.blocks_used * self.loader.block_size

    def mark(self) -> None:
        """Remember, before a step, what it changes besides weights and moments."""
        self._marked = self.step, self.loader.state_dict(), rng_states(self._device)

    @property
    def marked_random_numbers(self) -> dict[str, torch.Tensor]:
        """States of the generators at the last mark."""
        return self._marked[2]

    def rewind(self) -> None:
        """Undo the part of an interrupted step that has happened: data drawn, random numbers."""
        step, loader, rng = self._marked
        if self.step == step:
            self.loader.load_state_dict(loader)
            set_rng_states(rng, self._device)

    def go_back(self, folder: Path) -> None:
        """Restore the checkpoint in ``folder``; the data and the clock go on where they are.

        All processes call it.

        Args:
            folder: a checkpoint of this run.

        Raises:
            UserError: a file is missing, damaged, or does not fit the run.
        """
        position, elapsed = self.loader.state_dict(), self.elapsed
        self.pending.clear()
        self.validation = None
        checkpoint.load_weights(folder, self.model)
        self.restore(folder)
        self.loader.load_state_dict(position)
        # what was undone took time, too: --minutes limit all of it
        self.elapsed = elapsed
        # a loss that stays high must not bring the run back for ever
        self.spikes.clear()
        self.mark()

    def take_pending(self) -> list[StepResult]:
        """The results of the steps since the last record, which are then no longer pending."""
        results, self.pending = self.pending, []
        return results

    def save(self, run: Path, keep_last: int) -> None:
        """Begin to write the checkpoint of ``step``, then to delete those no longer kept.

        What it holds has been copied when this returns. ``settle`` waits until it is saved. All
        processes call it.

        Args:
            run: the run folder.
            keep_last: checkpoints kept beside the best one.

        Raises:
            UserError: it cannot be written, or the one before could not.
        """
        self.settle()
        validation = self.validation
        if validation is not None and not math.isfinite(validation.loss):
            validation = None
        state = {
            "elapsed": self.elapsed,
            "loader": self.loader.state_dict(),
            "scaler": self.scaler.state_dict(),
            "train_loss": _finite_or_none(self.train_loss),
            "validation": None if validation is None else asdict(validation),
            "pending": [[_finite_or_none(x.item()) for x in result] for result in self.pending],
            "losses": self.spikes.losses,
            **self.fixed,
        }
        write = checkpoint.staged(run, self.step, self.model, self.optimizer, state)

        def write_and_prune() -> None:
            write()
            if distributed.rank() == 0:
                checkpoint.prune(run, keep_last)

        weights = sum(own(parameter).nbytes for parameter in self.model.parameters())
        self.saver.begin(write_and_prune, aside=weights >= _MANY)

    def settle(self) -> None:
        """Wait until what was begun is saved. All processes call it.

        Raises:
            UserError: it cannot be written.
        """
        distributed.together(self.saver.wait)

    def restore(self, folder: Path) -> None:
        """Restore everything but the weights from the checkpoint in ``folder``.

        Raises:
            UserError: a file is missing, damaged, or does not fit the run.
        """
        state = runs.read_state(folder)
        try:
            self.step, self.elapsed = state["step"], state["elapsed"]
            self.train_loss = _or_nan(state["train_loss"])
            if state["validation"] is not None:
                self.validation = Validation(**state["validation"])
            for result in state["pending"]:
                loss, norm = torch.tensor([_or_nan(x) for x in result], device=self._device)
                self.pending.append(StepResult(loss, norm))
            # checkpoints of older versions have none
            self.spikes = Spikes(float(loss) for loss in state.get("losses", ()))
            self.loader.load_state_dict(state["loader"])
            # empty if the dtype needed no loss scale
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{folder}: damaged state: {error!r}") from None
        checkpoint.load_training_state(folder, self.model, self.optimizer)
        self.mark()


def check_data(folder: Path, tokenizer: str, data: str) -> None:
    """Refuse to continue a run with other tokens than it began with.

    Args:
        folder: the checkpoint to go on from.
        tokenizer: name and fingerprint of the run's tokenizer.
        data: digest of the tokens; checkpoints of older versions have none.

    Raises:
        UserError: the checkpoint was saved with others.
    """
    state = runs.read_state(folder)
    saved = state.get("tokenizer")
    if saved != tokenizer:
        raise UserError(f"{folder}: saved with tokenizer {saved}, the run's is {tokenizer}")
    saved = state.get("data", data)
    if saved != data:
        raise UserError(
            f"resume: the data has changed since {folder} was saved (digest {saved}, now {data}); "
            "give the same text with --data, or start a new run"
        )


def _finite_or_none(x: float) -> float | None:
    """The value as JSON can store it."""
    return x if math.isfinite(x) else None


def _or_nan(x: float | None) -> float:
    return math.nan if x is None else x
