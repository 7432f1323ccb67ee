"""Ctrl-C and the signals that end a job lead to a checkpoint, so that nothing is lost."""

import signal
import time
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, Self

from fastgpt2 import distributed
from fastgpt2.cli import handled

# Windows has no SIGHUP and no SIGUSR1
_ENDING = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
_SAVING = [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []
# seconds in which torchrun passes on a signal that this process has got already
_ECHO = 2.0


class Interrupted(Exception):
    """Raised by ``Interrupt.poll`` at a place where stopping is safe."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        # the exit code that a shell reports for a process ended by a signal
        self.exit_code = 128 + number


def nothing_to_save() -> AbstractContextManager[None]:
    """Within the block, SIGUSR1 does nothing, where it would end the process.

    It asks for a checkpoint, and there is none to save before the training and after it.
    """
    return handled(["SIGUSR1"], lambda *_: None)


class Interrupt:
    """Within the block, the first SIGINT, SIGTERM or SIGHUP is remembered; a second acts at once.

    SIGUSR1 asks for a checkpoint without ending the run. All processes obey a signal that one of
    them got: ``poll`` and ``save_is_wanted`` are called at the same places in each. A signal that
    was ignored when the block began, as nohup does with SIGHUP, stays ignored. Under torchrun, the
    same signal again within two seconds is the same one: Slurm sends it to all processes of a job,
    and torchrun, which gets it too, passes it on.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._moment = 0.0
        self._save = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        try:
            for numbers, handler in ((_ENDING, self._remember), (_SAVING, self._ask_for_save)):
                for number in numbers:
                    if signal.getsignal(number) is not signal.SIG_IGN:
                        self._previous[number] = signal.signal(number, handler)
        except ValueError:
            # outside the main thread Python allows no signal handlers: the caller handles signals
            return self
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def poll(self) -> None:
        """Raise ``Interrupted`` if a signal has come to any process."""
        (received,) = distributed.all_max(self._received or 0)
        if received:
            if self._received is None:
                # it is the job's first one: the next to this process is a second one, too
                self._received, self._moment = received, time.monotonic()
            raise Interrupted(received)

    def save_is_wanted(self) -> bool:
        """Whether SIGUSR1 has come to any process since the last call."""
        mine, self._save = self._save, False
        (wanted,) = distributed.all_max(int(mine))
        return bool(wanted)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received, self._moment = number, now
            if not distributed.is_elastic():
                self._restore()
        elif number != self._received or now - self._moment > _ECHO:
            self._restore()
            signal.raise_signal(number)

    def _ask_for_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())
