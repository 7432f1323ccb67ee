"""The records of a run's log, read one step late.

A record is begun when its step has been given to the device, and read after the step that follows:
the device never waits for the host. What needs the numbers earlier, an evaluation, a checkpoint or
the end of the run, finishes the record first.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastgpt2 import distributed
from fastgpt2.devices import HostCopy, peak_flops
from fastgpt2.train.console import Console
from fastgpt2.train.guard import KeptStep, check
from fastgpt2.train.loggers import Log
from fastgpt2.train.state import RunState
from fastgpt2.train.step import StepResult, TrainingStep


class Record:
    """The steps since the record before; the log shows their mean loss, and the last of them.

    The copy of their results to the host begins at once.

    Args:
        results: loss and gradient norm of these steps, on the device.
        last: the last step, in case that it has to be recomputed.
        lr: its learning rate.
        tokens: targets trained on until its end.
        elapsed: seconds of the run until its end.
    """

    def __init__(
        self,
        results: Sequence[StepResult],
        last: KeptStep,
        *,
        lr: float,
        tokens: int,
        elapsed: float,
    ) -> None:
        self.last, self.lr, self.tokens, self.elapsed = last, lr, tokens, elapsed
        values = torch.stack([value for result in results for value in result])
        self._copy = HostCopy(values)
        self._moment = time.perf_counter()

    def read(self) -> tuple[list[tuple[float, float]], float]:
        """Wait for the copy, but not for the steps that the device has been given since.

        Returns:
            Loss in nats per token and gradient norm of each step, and the moment at which the
            device had computed them.
        """
        pairs = self._copy.wait().view(-1, 2).tolist()
        if self._copy.is_asynchronous:
            self._moment = time.perf_counter()
        return [(loss, norm) for loss, norm in pairs], self._moment


class Records:
    """Checks and logs the records of a run; at most one waits to be read.

    All processes call its methods, and the first one writes.

    Args:
        state: state of the run.
        training_step: counts the steps that were not finite.
        run: the run folder.
        console: shows the newest record, and spikes.
        tokens_per_step: of all processes together.

    Attributes:
        log: where the records go; opened with the run folder, on the first process alone.
    """

    log: Log

    def __init__(
        self,
        state: RunState,
        training_step: TrainingStep,
        run: Path,
        console: Console,
        tokens_per_step: int,
    ) -> None:
        self._state, self._training_step, self._run = state, training_step, run
        self._console, self._tokens_per_step = console, tokens_per_step
        self._peak = peak_flops(training_step.device)
        self.restart()

    def restart(self) -> None:
        """Forget the record that waits; the speed is measured from this moment and step."""
        self._waiting: Record | None = None
        self._mark, self._mark_step = time.perf_counter(), self._state.step

    def pause(self, seconds: float) -> None:
        """Leave out of the speed what was not training.

        Args:
            seconds: how long it was, since the last record.
        """
        self._mark += seconds

    def finish(self, following: Record | None = None) -> int | None:
        """Check and log the record that waits.

        Args:
            following: waits from now on.

        Returns:
            The number of the first step whose loss is a spike; None where none is.

        Raises:
            UserError: the run has diverged; nothing waits any more.
            OSError: the log cannot be written.
        """
        record, self._waiting = self._waiting, None
        if record is None:
            self._waiting = following
            return None
        results, moment = record.read()
        last, spike = record.last, None
        for step, (loss, norm) in enumerate(results, last.step - len(results) + 1):
            check(self._training_step, last, self._run, (loss, norm, step))
            score = self._state.spikes.score(loss)
            if score is not None:
                spike = spike or step
                self._console.write(
                    f"step {step}: loss {loss:.4f} is a spike, {score:.0f} standard deviations "
                    "above the losses before"
                )
        finite = [loss for loss, _ in results if math.isfinite(loss)]
        self._state.train_loss = sum(finite) / len(finite) if finite else math.nan
        self._waiting = following
        self._show(record, norm, moment)
        return spike

    def _show(self, record: Record, grad_norm: float, moment: float) -> None:
        step, loss = record.last.step, self._state.train_loss
        speed = (step - self._mark_step) * self._tokens_per_step / (moment - self._mark)
        self._mark, self._mark_step = moment, step
        flops = self._training_step.model.flops_per_token() * speed / distributed.world_size()
        mfu = None if self._peak is None else flops / self._peak
        self.write(
            step=step,
            tokens=record.tokens,
            train_loss=loss,
            lr=record.lr,
            grad_norm=grad_norm,
            tokens_per_second=speed,
            mfu=mfu,
            elapsed=record.elapsed,
        )
        self._console.record(loss, record.lr, grad_norm, speed, mfu)

    def write(self, **record: float | None) -> None:
        """Append a record to the log.

        Args:
            record: by the names of the log's columns; None is left out.
        """
        distributed.on_rank_0(lambda: self.log.write(**record))
