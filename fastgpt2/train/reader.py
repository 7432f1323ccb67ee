"""Batches read by a thread of its own while the device computes."""

import threading
from collections import deque
from typing import Self

import torch
from torch.profiler import record_function

from fastgpt2.devices import device_kind
from fastgpt2.peers import READER
from fastgpt2.text import BlockStream
from fastgpt2.train.step import Batch


class Reader:
    """Gives the batches of a stream in order; as a context, reads the next ones in a thread.

    The stream's position counts the batches taken, not those read ahead: a batch is a function of
    its position. If the position is changed, batches read ahead for other positions are dropped.
    Batches for a GPU are in pinned memory.

    Args:
        stream: its position moves as batches are taken.
        device: where the batches are used.
        ahead: the most batches to read ahead.
    """

    def __init__(self, stream: BlockStream, device: torch.device, ahead: int) -> None:
        self._stream, self._ahead = stream, ahead
        self._pins = device_kind(device).cuda
        self._changed = threading.Condition()
        self._ready: deque[tuple[int, Batch | Exception]] = deque()
        # the position to read next; None while the thread has nothing to do
        self._place: int | None = None
        self._stopped = False
        # a daemon: a hanging disk must not delay the end of the program
        self._thread = threading.Thread(target=self._read, name=READER, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(timeout=1.0)

    def take(self, count: int) -> list[Batch]:
        """The next ``count`` batches.

        Args:
            count: number of micro-batches in a step.

        Raises:
            Exception: raised by the stream for one of them.
        """
        with record_function("data"):
            return [self._next() for _ in range(count)]

    def _next(self) -> Batch:
        place = self._stream.blocks_used
        with self._changed:
            if self._next_place() != place:
                self._ready.clear()
                self._place = place
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready)
            _, batch = self._ready.popleft()
            self._changed.notify_all()
        if isinstance(batch, Exception):
            raise batch
        self._stream.advance()
        return batch

    def _next_place(self) -> int | None:
        """The position of the next batch."""
        return self._ready[0][0] if self._ready else self._place

    def _read(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._has_work())
                if self._stopped:
                    return
                place = self._place
            assert place is not None
            batch: Batch | Exception
            try:
                batch = self._stream.batch_at(place)
                if self._pins:
                    batch = batch[0].pin_memory(), batch[1].pin_memory()
            except Exception as error:
                batch = error
            with self._changed:
                # otherwise the position was changed meanwhile
                if self._place == place:
                    self._ready.append((place, batch))
                    failed = isinstance(batch, Exception)
                    self._place = None if failed else place + self._stream.blocks_per_step
                    self._changed.notify_all()

    def _has_work(self) -> bool:
        return self._place is not None and len(self._ready) < self._ahead
