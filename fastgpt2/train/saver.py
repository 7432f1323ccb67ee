"""Checkpoints are written by a thread of their own, one at a time, while training goes on."""

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from fastgpt2.errors import EndedElsewhere
from fastgpt2.peers import SAVER

# niceness of a thread that steps aside: beside a thread of the training, the scheduler of Linux
# gives it about a seventieth of a core, and the moments that the training leaves
_ASIDE = 19


class Saver:
    """Does one piece of work at a time in a thread; as a context, waits for it at the end."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # a second signal acts at once
        if self._thread is not None and (kind is None or issubclass(kind, Exception)):
            self._thread.join()

    def begin(self, work: Callable[[], None], *, aside: bool) -> None:
        """Start the work; what was begun before has been waited for.

        Args:
            work: may raise, which ``look`` or ``wait`` says.
            aside: it takes so long that other threads are to go first. A short one would only keep
                them waiting, as when it has a lock of theirs.
        """
        assert self._thread is None

        def run() -> None:
            try:
                if aside:
                    _step_aside()
                work()
            except Exception as error:
                self._error = error

        # a daemon: a disk that hangs must not hold up the end of the program
        thread = threading.Thread(target=run, name=SAVER, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # the system gives no more threads: the training waits
            aside = False
            run()
        else:
            self._thread = thread

    def is_busy(self) -> bool:
        """Whether the work that was begun has not ended yet."""
        return self._thread is not None and self._thread.is_alive()

    def look(self) -> None:
        """Raise the error of work that has ended with one; others are not waited for.

        An error that another process will say is left to ``wait``: that process may be later.
        """
        if self._error is not None and not isinstance(self._error, EndedElsewhere):
            self.wait()

    def wait(self) -> None:
        """Wait for the end of the work, and raise its error."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error


def _step_aside() -> None:
    """Let other threads go first: this one gets what they leave of the processor.

    Linux has a priority for each thread, other systems for a process alone. While the run waits for
    this thread, it has the processor to itself.
    """
    if sys.platform == "linux":
        # some sandboxes forbid it
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _ASIDE)
