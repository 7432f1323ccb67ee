"""Ctrl-C while a command is still being imported: it ends at once and without a traceback."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any


def is_program(package: str) -> bool:
    """Whether this process was started as ``python -m PACKAGE...`` and is importing the package.

    Args:
        package: its name.
    """
    # "-m" stands there until the module is found, and its parent packages are imported before
    if sys.argv[:1] != ["-m"]:
        return False
    module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    return module.partition(".")[0] == package


def end_at_once() -> None:
    """From now on Ctrl-C ends this process with exit code 130: nothing has begun yet.

    A SIGINT that is ignored stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def ending_at_once() -> AbstractContextManager[None]:
    """As ``end_at_once``, within the block."""
    return _replaced(signal.default_int_handler, _leave)


def raising() -> AbstractContextManager[None]:
    """Within the block Ctrl-C raises ``KeyboardInterrupt`` again, if ``end_at_once`` was called."""
    return _replaced(_leave, signal.default_int_handler)


@contextmanager
def _replaced(old: Any, new: Any) -> Iterator[None]:
    """Within the block SIGINT goes to ``new``, if it went to ``old``."""
    # outside the main thread Python allows no signal handlers: the caller handles signals
    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is old
    if ours:
        signal.signal(signal.SIGINT, new)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, old)


def _leave(number: int, frame: FrameType | None) -> None:
    # an exception would be shown, or caught, by whatever is being imported
    os._exit(128 + number)
