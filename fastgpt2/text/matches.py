"""The files that a folder or a glob pattern names: the same set for both spellings."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from fastgpt2.errors import UserError


def matching_files(pattern: str) -> list[Path]:
    """The regular files that a pattern matches, sorted by name; hidden ones are left out.

    ``**`` matches any number of folders. Symbolic links are followed. The target of several links
    is taken once, so a link to a folder above itself does not loop.

    Args:
        pattern: as for ``glob.glob``, with ``recursive=True``.

    Raises:
        UserError: a folder below a ``**`` cannot be read.
    """
    return _distinct(_expand(Path(), Path(pattern).parts))


def files_below(folder: Path) -> list[Path]:
    """The files in ``folder`` and in all folders below it: what ``folder/**/*`` matches.

    Args:
        folder: where to begin; it may be hidden itself.

    Raises:
        UserError: a folder cannot be read.
    """
    return _distinct(_expand(folder, ("**", "*")))


def _distinct(paths: Iterator[Path]) -> list[Path]:
    """Regular files, sorted; a file with several names is listed under the first."""
    files: dict[str, Path] = {}
    for path in sorted(path for path in paths if path.is_file()):
        files.setdefault(os.path.realpath(path), path)
    return list(files.values())


def _expand(root: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    if "**" not in parts:
        names = glob.glob(os.path.join(*parts), root_dir=root) if parts else []
        yield from (root / name for name in names)
        return
    at = end = parts.index("**")
    # several in a row mean the same as one
    while parts[end : end + 1] == ("**",):
        end += 1
    # a ** at the end also matches files
    rest = parts[end:] or ("*",)
    seen: set[str] = set()
    for base in _expand(root, parts[:at]) if at else (root,):
        for folder in _folders(base, seen):
            yield from _expand(folder, rest)


def _folders(folder: Path, seen: set[str]) -> Iterator[Path]:
    """``folder`` and all folders below it that are not hidden, each real folder once."""
    real = os.path.realpath(folder)
    if real in seen or not folder.is_dir():
        return
    seen.add(real)
    yield folder
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"data: cannot read the folder {folder}: {error.strerror}") from None
    for entry in entries:
        if not entry.name.startswith("."):
            yield from _folders(entry, seen)
