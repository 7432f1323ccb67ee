"""Files and folders that are either whole or not there: nothing is ever written in place."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastgpt2.errors import UserError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends without error.

    The bytes are on the disk (fsync) before the rename, so that a crash at any moment leaves
    either the old file or the new one. On an error the temporary file is removed.
    """
    temporary = _beside(path)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes it when the block ends without error.

    All in it is on the disk (fsync) before the rename. On an error it is removed.

    Raises:
        UserError: ``path`` exists and is not empty.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists already and is not empty")
    temporary = _beside(path)
    try:
        temporary.mkdir()
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            sync(entry)
        if path.exists():
            path.rmdir()
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically; half a character, as of a file's name, as an escape."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def parse_json(text: str | bytes) -> Any:
    """``json.loads``, to which a value that is nested too deeply is a wrong one like any other.

    Args:
        text: the JSON; bytes are in UTF-8, UTF-16 or UTF-32.

    Raises:
        ValueError: it is not JSON that can be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def lock_file(handle: int) -> None:
    """Lock, or raise ``BlockingIOError``; the system ends the lock with the process."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError as error:
            raise BlockingIOError from error
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        # a file system without locks: the name alone is claimed
        return


def _beside(path: Path) -> Path:
    # the same folder is the same file system, where a rename is one step
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
