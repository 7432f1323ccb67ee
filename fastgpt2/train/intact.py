"""Which checkpoint of a run is whole: each file is compared with the digest saved beside it."""

import errno
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path

from fastgpt2 import runs
from fastgpt2.errors import UserError
from fastgpt2.files import sha256_of

# what a file says that is gone, or on a part of the disk that is broken; after another error, as of
# rights or of a server that is away, it may be whole
_DAMAGE = {
    getattr(errno, name, errno.ENOENT)
    for name in ("ENOENT", "ENOTDIR", "EISDIR", "EIO", "EBADMSG", "EUCLEAN")
}


def newest_intact(run: Path, notify: Callable[[str], None]) -> Path:
    """The newest checkpoint whose files are as they were saved.

    A newer one that is damaged is renamed, so that nothing takes it for a checkpoint; its files
    are kept.

    Args:
        run: the run folder.
        notify: shows a line for each damaged one.

    Raises:
        UserError: there is none, all are damaged, or a newer fastgpt2 has saved one; gives the
            reason of the newest one.
        OSError: a file cannot be read now.
    """
    newest = runs.latest(run)
    damaged: dict[Path, UserError] = {}
    for step in reversed(runs.saved_steps(run)):
        folder = runs.step_folder(run, step)
        try:
            _check_intact(folder)
        except runs.NewerFormatError:
            # whoever has saved it would miss it
            raise
        except UserError as error:
            damaged[folder] = error
            continue
        for other in sorted(folder.parent.glob("step_*")):
            if other.name > folder.name and not (other / runs.STATE).exists():
                damaged[other] = UserError(f"{other / runs.STATE}: cannot be read: it is missing")
        for other, reason in damaged.items():
            _set_aside(other)
            notify(f"{reason}; going on from {folder.name} instead")
        return folder
    raise damaged[newest]


def _set_aside(folder: Path) -> None:
    """Give a damaged checkpoint a name that no checkpoint has."""
    for number in count(1):
        name = f"damaged_{folder.name}" + (f"_{number}" if number > 1 else "")
        if not (target := folder.with_name(name)).exists():
            os.rename(folder, target)
            return


def _check_intact(folder: Path) -> None:
    """Raise ``UserError`` if a file has another digest than was saved, or is a foreign shard."""
    # ``read_state`` calls a file damaged that cannot be read now
    _digest(folder / runs.STATE)
    saved = runs.read_state(folder).get("sha256", {})
    shards = {path.relative_to(folder).as_posix() for path in (folder / runs.SHARDS).glob("*")}
    if foreign := sorted(shards - saved.keys()):
        raise UserError(f"{folder / foreign[0]}: not a file of this checkpoint")
    for name, digest in saved.items():
        if _digest(folder / name) != digest:
            raise UserError(f"{folder / name}: damaged: its sha256 is not the saved one")


def _digest(path: Path) -> str:
    """The sha256 of a file; ``UserError`` if the file is damaged, other errors as they come."""
    try:
        return sha256_of(path)
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
