"""The progress bars of an evaluation."""

from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

from fastgpt2 import distributed, streams

Item = TypeVar("Item")


def progress(items: Iterable[Item], description: str | None, unit: str) -> "tqdm[Item]":
    """``items``, with a bar that vanishes at the end; only on a terminal, of one process.

    Args:
        items: what is worked through.
        description: the words before the bar.
        unit: what one of the items is called.
    """
    options: dict[str, Any] = {"disable": True if distributed.rank() else None}
    return tqdm(items, description, unit=unit, leave=False, delay=streams.BAR_DELAY, **options)
