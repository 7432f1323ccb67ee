"""Leave out the files of training runs, which are not text to train on."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path


def without_runs(paths: Iterable[Path]) -> list[Path]:
    """The paths that do not lie in a run folder of ``fastgpt2 train``.

    Otherwise a run that trains on a folder above its own (``--data .``) would read its own
    checkpoints when it resumes.

    Args:
        paths: files and folders.
    """
    is_run = cache(_is_run)
    return [p for p in paths if not any(is_run(folder) for folder in p.absolute().parents)]


def _is_run(folder: Path) -> bool:
    # a run that ended before its first evaluation has only one of the two
    names = ("checkpoints", "metrics.jsonl")
    return (folder / "config.toml").is_file() and any((folder / name).exists() for name in names)
