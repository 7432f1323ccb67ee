"""Text that can be read only once: a pipe, a terminal (process substitution, /dev/stdin)."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastgpt2.errors import UserError

# seconds of silence before it is said what is waited for
PATIENCE = 3.0


def read_once(item: str) -> bytes:
    """All bytes of a pipe or a terminal, read now.

    Args:
        item: its path.

    Raises:
        UserError: it cannot be read, or is another kind of device, which might never end.
    """
    path = Path(item)
    try:
        with waiting_for(item), path.open("rb") as file:
            if path.is_fifo() or file.isatty() or os.path.samefile(item, os.devnull):
                return file.read()
            raise UserError(f"data: {item} is a device, not a text")
    except OSError as error:
        raise UserError(f"data: cannot read {item}: {error.strerror}") from None


@contextmanager
def waiting_for(item: str) -> Iterator[None]:
    """If the block takes long, say on stderr that it waits for the text of ``item``.

    Args:
        item: a pipe that may have no writer, or one that does not end.
    """
    timer = threading.Timer(PATIENCE, _say, (item,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(item: str) -> None:
    print(f"waiting for the end of {item} ...", file=sys.stderr, flush=True)
