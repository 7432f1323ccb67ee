"""The terminal may go away; what a program does goes on."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

# seconds before a progress bar is shown: the line of an error that comes at once stands alone
BAR_DELAY = 1.0


class SteadyStream:
    """A text stream whose failures are silent: a write after the first one goes nowhere.

    Args:
        stream: where the text goes while that works.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._broken = False

    def write(self, text: str) -> int:
        """As the stream's own; a failure is the last thing that is tried on it."""
        self._attempt("write", text)
        return len(text)

    def flush(self) -> None:
        """As the stream's own, in silence."""
        self._attempt("flush")

    def isatty(self) -> bool:
        """Whether it is a terminal that still answers."""
        return not self._broken and bool(self._attempt("isatty"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, name: str, *arguments: str) -> Any:
        if self._broken:
            return None
        try:
            return getattr(self._stream, name)(*arguments)
        except (OSError, ValueError):
            # a closed stream is a ValueError
            self._broken = True
            abandon(self._stream)
            return None


@contextmanager
def steady_streams(*, stdout: bool = True) -> Iterator[None]:
    """Within the block, a write to stdout or stderr that fails raises nothing.

    Args:
        stdout: False leaves stdout as it is, where what is printed is the program's result.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _steady(sys.stdout) if stdout else sys.stdout, _steady(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr) if stdout else (sys.stderr,):
            stream.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def silent(wanted: bool = True, *, errors: bool = True) -> Iterator[None]:
    """Within the block, what is printed goes nowhere.

    Args:
        wanted: False changes nothing.
        errors: what goes to stderr, too.
    """
    if not wanted:
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nothing,
        redirect_stdout(nothing),
        redirect_stderr(nothing if errors else sys.stderr),
    ):
        yield


def _steady(stream: Any) -> Any:
    return stream if isinstance(stream, SteadyStream) else SteadyStream(stream or io.StringIO())


def open_missing_streams() -> None:
    """Open what ``2>&-`` has closed: else the next file that is opened becomes stderr."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # the lowest free number is what a new file gets
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def abandon(stream: TextIO) -> None:
    """Point a broken stream at nothing, so that the interpreter's last flush cannot fail."""
    try:
        number = stream.fileno()
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, number)
        os.close(nothing)
    except (OSError, ValueError):
        # a stream without a file: nothing of it is flushed at the end
        return
