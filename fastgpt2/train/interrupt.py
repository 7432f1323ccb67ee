"""Ctrl-C and SIGTERM, turned into a checkpoint instead of a loss."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupted(Exception):
    """Raised by ``Interrupt.poll`` at a place where stopping is safe."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        # what a shell reports for a process that a signal ended
        self.exit_code = 128 + number


class Interrupt:
    """Within the block, the first SIGINT or SIGTERM is remembered; a second one acts at once."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._remember)
            except ValueError:
                # not the main thread: signals are somebody else's business
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def poll(self) -> None:
        """Raise ``Interrupted`` if a signal has come."""
        if self._received is not None:
            raise Interrupted(self._received)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())
