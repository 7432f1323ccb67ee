"""What every command does around its body: one line for an error, and an exit code."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from fastgpt2.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2, as for every other mistake of a user."""
        self.exit(2, f"{self.prog}: error: {message} (--help shows all flags)\n")


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """These options are 1 or more.

    Raises:
        UserError: one is not; names its flag.
    """
    for name in names:
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: must be 1 or more, got {getattr(options, name)}")


def run(name: str, body: Callable[[], int | None]) -> int:
    """Call ``body`` and turn how it ended into an exit code.

    A ``UserError`` becomes one line on stderr and 2, Ctrl-C one line and 130, a closed pipe
    (``... | head``) a quiet 141, as the shell has them. Any other exception is a fault of ours and
    keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # a generated character that the terminal's encoding lacks must not end the program
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return body() or 0
    except UserError as error:
        print(f"fastgpt2 {name}: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nfastgpt2 {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the interpreter flushes stdout at exit and would complain once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
