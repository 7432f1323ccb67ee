"""What every command does around its body: one line for an error, and an exit code."""

import argparse
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from fastgpt2 import early
from fastgpt2.errors import EndedElsewhere, Stopped, UserError
from fastgpt2.streams import abandon, open_missing_streams, steady_streams

# how PyTorch and NumPy say that a tensor does not fit into memory, on this or on any machine
_NO_ROOM = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "invalid buffer size",
    "calculation overflowed",
    "multiplication overflow",
    "overflow when unpacking",
    "array is too big",
    "Maximum allowed dimension exceeded",
    "can't start new thread",
)
# how libraries in C++ say what is an OSError in Python
_NO_FILES = "Too many open files"
# characters of an error's line
_LONGEST = 2_000


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2, as for every other mistake of a user."""
        self.exit(2, f"{self.prog}: error: {_short(message)} (--help shows all flags)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        # what --help prints may find a full disk or no reader, of which argparse would say nothing
        code = run(self.prog.removeprefix("fastgpt2 "), lambda: _write(message, file))
        if code:
            sys.exit(code)


def _write(message: str, file: Any) -> None:
    # a stream that is closed takes nothing
    if message and file is not None:
        file.write(message)


def file_name(text: str) -> str:
    """The value of a flag that names a file or a folder; the ``type`` of such a flag.

    Args:
        text: what the command line has.

    Raises:
        ArgumentTypeError: it is empty, as an unset variable of a shell is, or holds a NUL.
    """
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"must not hold a NUL character, got {text!r}")
    return text


def file_path(text: str) -> Path:
    """As ``file_name``, for a flag whose value is a ``Path``."""
    return Path(file_name(text))


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """These options are 1 or more.

    Raises:
        UserError: one is not; names its flag.
    """
    for name in names:
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: must be 1 or more, got {getattr(options, name)}")


def quoted(text: str | Path) -> str:
    """The text as an argument that can be copied into a shell.

    Args:
        text: a name, a prompt, a path.
    """
    return shlex.quote(str(text)) if os.name == "posix" else f'"{text}"'


def run(name: str, body: Callable[[], int | None], *, steady: bool = False) -> int:
    """Call ``body`` and turn how it ended into an exit code.

    A ``UserError``, an ``OSError`` and a lack of memory become one line on stderr and 2. Ctrl-C
    becomes one line and 130, SIGTERM one line and 143, SIGHUP one line and 129, a closed pipe
    (``... | head``) a quiet 141, the shell's codes; half-written files are removed. Any other
    exception is our fault and keeps its traceback. A failing stderr does not end the command.

    Args:
        name: the command's name in the line on stderr.
        body: does the work; returns its exit code, None for 0.
        steady: the work matters more than its output: a failing stdout does not end it either.
    """
    open_missing_streams()
    try:
        os.getcwd()
    except FileNotFoundError:
        # a library of PyTorch's ends the process there
        _say(f"fastgpt2 {name}: error: the working folder has been deleted; cd to another one")
        return 2
    for stream in (sys.stdout, sys.stderr):
        # a generated character that the terminal's encoding lacks must not end the program
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with steady_streams(stdout=steady), early.raising(), _signals_raise():
        return _run(name, body)


def _signals_raise() -> AbstractContextManager[None]:
    """Within the block SIGTERM and SIGHUP raise ``Stopped``; one that is ignored stays ignored."""
    # torchrun ends processes that wait for each other: they would not see an exception
    names = () if "RANK" in os.environ else ("SIGTERM", "SIGHUP")
    return handled(names, _stop)


@contextmanager
def handled(
    names: Iterable[str], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Within the block these signals go to ``handler``, if they have their default action now.

    Args:
        names: of signals; one that the system does not have is left out.
        handler: gets the number of the signal.
    """
    previous: dict[int, Any] = {}
    try:
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            if signal.getsignal(number) is signal.SIG_DFL:
                previous[number] = signal.signal(number, handler)
    except ValueError:
        # outside the main thread Python allows no signal handlers: the caller handles signals
        pass
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _stop(number: int, frame: FrameType | None) -> None:
    # a second one acts at once
    signal.signal(number, signal.SIG_DFL)
    raise Stopped(number)


def _run(name: str, body: Callable[[], int | None]) -> int:
    try:
        code = body() or 0
        # the disk may be full for what is still in the buffer
        sys.stdout.flush()
        return code
    except Stopped as stopped:
        _say(f"\nfastgpt2 {name}: stopped by {stopped}")
        return stopped.exit_code
    except KeyboardInterrupt:
        _say(f"\nfastgpt2 {name}: interrupted")
        return 130
    except BrokenPipeError:
        # the interpreter flushes stdout at exit, which would fail again
        abandon(sys.stdout)
        return 141
    except EndedElsewhere as ending:
        return ending.exit_code
    except Exception as error:
        line = in_one_line(error)
        if line is None:
            raise
        _say(f"fastgpt2 {name}: error: {_short(line)}")
        return 2


def exit_code(error: Exception) -> int:
    """The exit code of a command after this error: 2, or 1 where the fault is ours.

    Args:
        error: what the command's body has raised.
    """
    if isinstance(error, EndedElsewhere):
        return error.exit_code
    return 1 if in_one_line(error) is None else 2


def in_one_line(error: Exception) -> str | None:
    """What to tell a person about an error that the surroundings caused, or None if we did.

    Args:
        error: a ``UserError``, an ``OSError``, a lack of memory, or anything else.
    """
    if isinstance(error, UserError):
        return " ".join(str(error).splitlines())
    if isinstance(error, OSError):
        what = error.strerror or " ".join(str(error).split()) or type(error).__name__
        names = [str(n) for n in (error.filename, error.filename2) if n is not None]
        return ": ".join([*names[:1], what])
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(part in text for part in _NO_ROOM):
        return f"out of memory: {text[:200] or 'an allocation failed'}"
    return f"{_NO_FILES}: see ulimit -n" if _NO_FILES in text else None


def _short(line: str) -> str:
    """The line; of a very long one, as of a number of thousands of digits, both ends."""
    if len(line) <= _LONGEST:
        return line
    return f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
    except (OSError, ValueError):
        for stream in (sys.stdout, sys.stderr):
            abandon(stream)
