"""Files that are either whole or not there: nothing is ever written in place."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends without error.

    The bytes are on the disk (fsync) before the rename, so that a crash at any moment leaves
    either the old file or the new one. On an error the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        set_default_mode(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def sync(path: Path) -> None:
    """Ask the system to put a file, or the entries of a folder, on the disk."""
    if path.is_dir() and os.name == "nt":
        # Windows cannot open a folder, and orders renames by itself
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def set_default_mode(path: Path) -> None:
    """Give a file or folder of ``tempfile``, made for its owner only, the usual permissions."""
    # the only portable way to read the mask is to set it
    mask = os.umask(0o022)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
