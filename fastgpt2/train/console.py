"""What a person sees of a run while it trains: a few lines first, then a progress bar."""

import sys
from collections.abc import Callable
from typing import Any, Self

import torch
from tqdm import tqdm

from fastgpt2 import distributed, streams
from fastgpt2.model import GPT
from fastgpt2.text.dataset import Dataset
from fastgpt2.train import summary
from fastgpt2.train.memory import Memory
from fastgpt2.train.validation import Validation


class Console:
    """Shows a run; as a context, with the progress bar of its steps. Only the first of several
    processes prints.

    Args:
        notify: shows a line before the training begins.
    """

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._speaks = distributed.rank() == 0
        self.notify = notify if self._speaks else _silent
        self._bar: tqdm[Any] | None = None

    def introduce(
        self,
        dataset: Dataset,
        tokenizer_id: str,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        memory: Memory,
        *,
        dtype: torch.dtype,
        kernels: str,
    ) -> None:
        """The data, the model, its memory and its kernels."""
        val_tokens = 0 if dataset.val is None else len(dataset.val)
        self.notify(
            f"data: {dataset.source}; {len(dataset.train):,} training and {val_tokens:,} "
            f"validation tokens (tokenizer {tokenizer_id})"
        )
        for line in summary.model_lines(model, optimizer, memory, dtype):
            self.notify(line)
        self.notify(f"kernels: {kernels}")

    def begin(
        self, step: int, total_steps: int | None, minutes: float | None, tokens_per_step: int
    ) -> Self:
        """Show the length of the run, and the bar, at step ``step``."""
        length = "by time" if total_steps is None else f"{total_steps:,} steps"
        limit = "" if minutes is None else f", at most {minutes:g} minutes"
        done = f" ({step:,} done)" if step else ""
        self.notify(f"training: {length}{limit}{done}, {tokens_per_step:,} tokens per step")
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not self._speaks,
            delay=streams.BAR_DELAY,
            # a log file gets a line every few seconds, not ten per second
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self) -> None:
        """One more step is done."""
        assert self._bar is not None
        self._bar.update(1)

    def go_back(self, step: int) -> None:
        """Show that a loss spike was undone: the run is back at ``step``."""
        assert self._bar is not None
        self._bar.n = step
        self._bar.refresh()
        self.write(f"gone back to step {step}; the data since then is skipped")

    def say(self, text: str) -> None:
        """Print lines above the bar, or before there is one."""
        (self.notify if self._bar is None else self._bar.write)(text)

    def write(self, text: str) -> None:
        """Print lines above the bar."""
        assert self._bar is not None
        if self._speaks:
            self._bar.write(text)

    def record(
        self, loss: float, lr: float, grad_norm: float, speed: float, mfu: float | None
    ) -> None:
        """The last record of the log, beside the bar; ``speed`` in tokens per second."""
        assert self._bar is not None
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, lr {lr:.1e}, norm {grad_norm:.2f}, "
            f"{summary.human(speed)} tok/s, MFU {'unknown' if mfu is None else f'{mfu:.1%}'}",
            refresh=False,
        )

    def evaluation(self, step: int, result: Validation, seconds: float) -> None:
        """An evaluation's losses, and how long it took."""
        per_byte = f", {result.nats_per_byte:.4f} nats/byte" if result.text_bytes else ""
        self.write(
            f"step {step}: validation loss {result.loss:.4f} nats/token, perplexity "
            f"{result.perplexity:.2f}{per_byte} ({seconds:.1f} s)"
        )

    def sample(self, text: str) -> None:
        """A sample of the model's text."""
        self.write("\n".join(f"  | {line}" for line in text.strip().splitlines()))


def _silent(line: str) -> None:
    """The output of the other processes: none."""
