"""Other programs that show a run: TensorBoard and Weights & Biases, each in an extra.

They get the records of ``metrics.jsonl``. An error of a logger becomes one line, and the run goes
on without it.
"""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

from fastgpt2.train.metrics import MetricsLog


class Logger(Protocol):
    """One of these programs, open for a run."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Take the finite values of a record."""

    def close(self, exit_code: int) -> None:
        """The run has ended; 0 is as planned."""


class TensorBoard:
    """Event files in ``RUN/tensorboard``, written by TensorBoard's own records.

    Its own ``SummaryWriter`` would import TensorFlow if that is installed, and TensorFlow imported
    before Triton crashes the process.
    """

    def __init__(self, run: Path, step: int, config: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        folder = run / "tensorboard"
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._file = (folder / name).open("ab")
        self._records = RecordWriter(self._file)
        self._put(Event(file_version="brain.Event:2"))
        # the resume has undone what another file holds from this step on
        self._put(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one scalar for each value to the disk at once."""
        event = self._event(step=step)
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._put(event)

    def close(self, exit_code: int) -> None:
        """Close the file."""
        self._file.close()

    def _put(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._file.flush()


class WeightsAndBiases:
    """A run of W&B in ``RUN/wandb``: offline, for ``wandb sync``, unless WANDB_MODE is set."""

    def __init__(self, run: Path, step: int, config: dict[str, Any]) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        identity = run / "wandb-id"
        if not identity.exists():
            identity.write_text(os.urandom(4).hex(), encoding="utf-8")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastgpt2"),
            name=run.absolute().name,
            id=identity.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=run,
            config=config,
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """The record under its step."""
        self._run.log(values, step=step)

    def close(self, exit_code: int) -> None:
        """Finish; online, this sends the rest of the data."""
        self._run.finish(exit_code=exit_code)


# by the name for --log, which is also that of the extra
LOGGERS: dict[str, Callable[[Path, int, dict[str, Any]], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


class Log:
    """Where the records of a run go: ``metrics.jsonl`` and ``.csv``, and then the loggers.

    Args:
        run: the run folder.
        step: steps taken so far; records after them are dropped.
        names: some of ``LOGGERS``.
        config: the run's configuration, for a logger that shows it.
        notify: shows a line.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        names: tuple[str, ...],
        config: dict[str, Any],
        notify: Callable[[str], None],
    ) -> None:
        self._metrics, self._notify = MetricsLog(run, step), notify
        self._loggers: dict[str, Logger] = {}
        for name in names:
            try:
                self._loggers[name] = LOGGERS[name](run, step, config)
            except ImportError as error:
                self._notify(f"log: no {name}: {error} (pip install 'fastgpt2[{name}]')")
            except Exception as error:
                self._give_up(name, error)

    def write(self, **record: float | None) -> None:
        """Append one record; None and non-finite values are left out."""
        kept = self._metrics.write(**record)
        step = int(kept.pop("step"))
        for name, logger in list(self._loggers.items()):
            try:
                logger.write(step, kept)
            except Exception as error:
                self._give_up(name, error)

    def close(self, exit_code: int) -> None:
        """The run has ended; 0 is as planned."""
        for name, logger in list(self._loggers.items()):
            try:
                logger.close(exit_code)
            except Exception as error:
                self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        # any error: the training is worth more than its display elsewhere
        self._loggers.pop(name, None)
        reason = shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        self._notify(f"log: {name} has failed ({reason}); training goes on without it")
