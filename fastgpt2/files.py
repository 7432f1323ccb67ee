"""Files and folders that are either whole or not there: nothing is ever written in place."""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastgpt2.errors import UserError

# the names that _hidden gives
_TEMPORARY = re.compile(r"\..{0,50}\.[0-9a-f]{8}\.tmp", re.DOTALL)
# of the temporary folder within one that is filled
_CONTENT = "content"


@contextmanager
def atomic_path(path: Path, *, new: bool = False) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends without error.

    The bytes are on the disk (fsync) before the rename, so that a crash at any moment leaves
    either the old file or the new one. On an error the temporary file is removed. A link stays one:
    what it points to is replaced.

    Args:
        path: the file.
        new: nothing is replaced, not even what another process has put there during the block.

    Raises:
        UserError: ``path`` is a device, a pipe or a socket, which cannot be replaced; or it is to
            be new and exists.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: is not a regular file")
    temporary = _hidden(path)
    with new_folders(path.parent):
        try:
            temporary.touch(exist_ok=False)
            yield temporary
            sync(temporary)
            (_put if new else os.replace)(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


@contextmanager
def atomic_folder(path: Path, *, last: Collection[str] = ()) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends without error.

    All in it is on the disk (fsync) before the rename. On an error it is removed. An empty folder
    that is there already stays, and gets the content: it may be a mount point, a link, or ``.``.

    Args:
        path: the folder.
        last: names of the entries that make the content complete; they come after the others.

    Raises:
        UserError: ``path`` exists and is not empty, before the block or after it.
    """
    there = path.exists()
    if there and (not path.is_dir() or any(path.iterdir())):
        raise _taken(path)
    # a rename is one step only within a file system, and a folder may be mounted
    temporary = _hidden(Path(os.path.realpath(path)) / _CONTENT if there else path)
    with new_folders(temporary.parent):
        try:
            temporary.mkdir()
            yield temporary
            for entry in (*temporary.rglob("*"), temporary):
                sync(entry)
            if there:
                _move_up(temporary, last)
            else:
                _rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync(temporary.parent)


@contextmanager
def new_folders(path: Path) -> Iterator[None]:
    """Create ``path`` and the folders above it; after the block, those still empty are removed.

    Only folders that were not there before are removed.
    """
    # the innermost first
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        remove_empty(missing)


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that are empty.

    Args:
        folders: an inner one before the outer one.
    """
    for folder in folders:
        # one that holds something cannot be removed
        with suppress(OSError):
            folder.rmdir()


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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within the block, an ``OSError`` that names no file is one of ``path``.

    Opening a file names it, but reading from one that is open does not.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with naming(path), path.open("rb") as file:
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


@contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Within the block, no other process is in such a block; a killed one leaves no claim.

    Args:
        path: a file for this alone; removed at the end.
        taken: the error's message.

    Raises:
        UserError: another process is.
    """
    handle = _lock(path, taken)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _lock(path: Path, taken: str) -> int:
    """An open file that holds the lock."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            lock_file(handle)
        except BlockingIOError:
            os.close(handle)
            raise UserError(taken) from None
        # the process before may have removed the file since it was opened
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
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


def _put(temporary: Path, path: Path) -> None:
    """Give a file its name, which must be free."""
    try:
        # unlike a rename, a link replaces nothing
        os.link(temporary, path)
    except FileExistsError:
        raise UserError(f"{path}: exists already") from None
    except OSError:
        # a file system without links
        if path.exists():
            raise UserError(f"{path}: exists already") from None
        os.replace(temporary, path)


def _rename(temporary: Path, path: Path) -> None:
    """Give a folder its name, which must be free or that of an empty folder."""
    try:
        os.rename(temporary, path)
    except OSError:
        # another process has been faster
        if path.exists():
            raise _taken(path) from None
        raise


def _move_up(folder: Path, last: Collection[str]) -> None:
    """Move all that ``folder`` holds into the folder around it, or nothing."""
    moved: list[Path] = []
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name in last)
    with _alone_in(folder.parent):
        # other processes may be at work there, and one of them may have been faster
        if any(not _is_content(entry) for entry in folder.parent.iterdir()):
            raise _taken(folder.parent)
        try:
            for entry in entries:
                os.rename(entry, folder.parent / entry.name)
                moved.append(folder.parent / entry.name)
        except BaseException:
            for entry in moved:
                os.rename(entry, folder / entry.name)
            raise


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Within the block, no other process is in such a block for the folder."""
    if os.name == "nt":
        # Windows cannot open a folder
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock_file(handle)
        yield
    except BlockingIOError:
        raise _taken(folder) from None
    finally:
        os.close(handle)


def _taken(path: Path) -> UserError:
    return UserError(f"{path}: exists already and is not empty")


def _is_content(path: Path) -> bool:
    """Whether it is the temporary folder of a process that fills the folder around it."""
    return path.name.startswith(f".{_CONTENT}.") and bool(_TEMPORARY.fullmatch(path.name))


def is_temporary(path: Path) -> bool:
    """Whether it is a file under the name that ``atomic_path`` gives it until it is whole.

    Where nobody writes, a process that was killed has left it.
    """
    return _TEMPORARY.fullmatch(path.name) is not None and path.is_file()


def _hidden(path: Path) -> Path:
    """A new hidden name beside ``path``, in the same folder and so on the same file system."""
    # a name may have 255 bytes, and a character of it four
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.tmp")
