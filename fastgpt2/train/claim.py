"""The run folder belongs to one process at a time: claimed before anything slow."""

import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path

from fastgpt2 import distributed, runs
from fastgpt2.errors import UserError
from fastgpt2.files import is_temporary, locked, new_folders, remove_empty

LOCK = ".lock"
# seconds until another machine sees a new file, at most
_PATIENCE = 5.0
# what is mounted where, a line each; the fifth word is the place
MOUNTS = Path("/proc/self/mountinfo")


@contextmanager
def claimed(folder: Path, *, made: Iterable[Path] = ()) -> Iterator[None]:
    """Within the block, no other process can claim the folder; a killed process leaves no claim.

    Folders that did not exist, and are empty after the block, are removed.

    Args:
        folder: the run folder; created if it does not exist.
        made: the folders that the caller has created for this block, the innermost first.

    Raises:
        UserError: another process has it.
    """
    try:
        taken = f"{folder}: another process is training into it"
        with new_folders(folder), locked(folder / LOCK, taken):
            yield
    finally:
        remove_empty(made)


def check_shared(folder: Path) -> None:
    """Check that all processes of the job see the claimed folder; all call it.

    Args:
        folder: the run folder, which the first process has claimed.

    Raises:
        UserError: this process sees another folder of that name, or none.
        EndedElsewhere: that happened to another process.
    """
    if distributed.world_size() == 1:
        return
    mark = distributed.on_rank_0(lambda: _marked(folder))
    distributed.together(lambda: _find(folder, mark))


def _marked(folder: Path) -> str:
    """What was written into the claim, to be recognised."""
    mark = secrets.token_hex(16)
    (folder / LOCK).write_text(mark, encoding="ascii")
    return mark


def _find(folder: Path, mark: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        with suppress(OSError):
            if (folder / LOCK).read_text(encoding="ascii", errors="replace") == mark:
                return
        if time.monotonic() > deadline:
            raise UserError(
                f"--out {folder}: process {distributed.rank()} (on {socket.gethostname()}) does "
                "not see the folder of process 0; it must be on a disk that all machines share"
            )
        time.sleep(0.1)


def new_folder(name: str) -> tuple[Path, ...]:
    """Create a new folder under ``runs/``, named by the time and ``name``.

    Returns:
        the folder, then ``runs/`` if it was not there.
    """
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    first = Path("runs") / f"{stamp}_{name}"
    around = () if first.parent.exists() else (first.parent,)
    try:
        first.parent.mkdir(exist_ok=True)
        for number in count(1):
            folder = first if number == 1 else first.with_name(f"{first.name}_{number}")
            # one of two processes that try the same name gets an error
            with suppress(FileExistsError):
                folder.mkdir()
                return (folder, *around)
    except OSError:
        remove_empty(around)
        raise
    raise AssertionError


def is_empty(folder: Path) -> bool:
    """Whether the folder holds nothing but a claim, and what a killed process left half-written."""
    return all(entry.name == LOCK or is_temporary(entry) for entry in folder.iterdir())


def empty(folder: Path) -> None:
    """Delete the folder's content, not the folder: it may be a mount point, a link, or ``.``.

    Raises:
        UserError: something is mounted below it, whose content would be deleted too.
    """
    for point in _mounted_below(folder):
        raise UserError(f"--overwrite: something is mounted on {point}, which would be emptied")
    entries = [entry for entry in folder.iterdir() if entry.name != LOCK]
    # the file that makes it a run folder goes last, so that a failed deletion can be repeated
    for entry in sorted(entries, key=lambda entry: entry.name == runs.RUN_CONFIG):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def check_outside(folder: Path, paths: Iterable[Path], what: str) -> None:
    """Refuse to empty a folder that holds what the new run needs.

    Args:
        folder: the run folder; links are followed, as in ``paths``.
        paths: files or folders.
        what: their name in the error.

    Raises:
        UserError: one of them lies in the folder, or is the folder.
    """
    inside = folder.resolve()
    for path in paths:
        # a link on the way is deleted, wherever it leads
        links = (step for step in (path.absolute(), *path.absolute().parents) if step.is_symlink())
        places = (path.resolve(), *(link.parent.resolve() for link in links))
        if any(inside in (place, *place.parents) for place in places):
            raise UserError(f"--overwrite: {what} {path} is in {folder}, which would be emptied")


def _mounted_below(folder: Path) -> list[Path]:
    """The mount points in a folder, at any depth."""
    try:
        table = MOUNTS.read_bytes()
    except OSError:
        # another system than Linux: its other file systems can be seen, but no bind mounts
        return [path for path in folder.rglob("*") if os.path.ismount(path)]
    # a space in a name is written as \040
    names = [
        re.sub(rb"\\(\d{3})", lambda octal: bytes([int(octal[1], 8)]), line.split()[4])
        for line in table.splitlines()
    ]
    inside = folder.resolve()
    return [path for path in map(Path, map(os.fsdecode, names)) if inside in path.parents]
