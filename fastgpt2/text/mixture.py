"""Several corpora drawn by weight: ``--data a.txt:0.3 b/:0.7``."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgpt2.errors import UserError
from fastgpt2.text.corpora import CORPUS_NAMES, absolute, corpus_paths
from fastgpt2.text.stored import JoinedTokens


@dataclass(frozen=True)
class Mixture(JoinedTokens):
    """Training tokens of several sources.

    Attributes:
        tokens: the ids of each source.
        names: the sources, as they were given.
        weights: each source's share of the blocks; they add up to 1.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]


def split_weight(item: str) -> tuple[str, float | None]:
    """The name in an item of ``--data``, and its weight if it has one: ``a.txt:0.3``.

    If the whole item exists, colon and number included, it has no weight: a file called ``a:1``, or
    a match of a pattern such as ``logs/*:1``. ``C:\\a.txt`` does not end in a number.

    Args:
        item: one element of ``--data``.

    Raises:
        UserError: the weight is not a positive number.
    """
    name, colon, tail = item.rpartition(":")
    if not (colon and name):
        return item, None
    try:
        weight = float(tail)
    except ValueError:
        return item, None
    if Path(item).exists() or corpus_paths(item):
        return item, None
    if not (weight > 0 and math.isfinite(weight)):
        raise UserError(f"data: {item}: the weight must be a positive number, got {tail}")
    return name, weight


def split_weights(data: str | Sequence[str]) -> tuple[list[str], list[float]] | None:
    """The names and weights in ``data``, the weights scaled to a sum of 1; None without weights.

    Args:
        data: what ``build_dataset`` takes.

    Raises:
        UserError: a weight is not a positive number or vanishes beside the others, or some items
            have one and some do not.
    """
    items = [data] if isinstance(data, str) else list(data)
    pairs = [split_weight(item) for item in items]
    weights = [weight for _, weight in pairs if weight is not None]
    if not weights:
        return None
    if len(weights) < len(items):
        bare = next(name for name, weight in pairs if weight is None)
        raise UserError(f"data: {bare} has no weight; give one to all (NAME:WEIGHT) or to none")
    total = sum(weights)
    shares = [weight / total for weight in weights]
    if not all(shares):
        raise UserError(f"data: the weights are too far apart, or too large: {' '.join(items)}")
    return [name for name, _ in pairs], shares


def check_distinct(names: Sequence[str], notify: Callable[[str], None]) -> None:
    """Refuse a mixture that names one source twice, and say if a file is in several sources.

    Args:
        names: the sources.
        notify: called with a line that names such a file.

    Raises:
        UserError: two sources are the same.
    """
    there: dict[str, str] = {}
    for name in names:
        place = name if name in CORPUS_NAMES else os.path.realpath(name)
        if place in there:
            raise UserError(
                f"data: {name} is in the mixture twice; give it once, with the sum of its weights"
            )
        there[place] = name
    files: dict[str, str] = {}
    for name in names:
        for path in filter(Path.is_file, corpus_paths(name)):
            other = files.setdefault(os.path.realpath(path), name)
            if other != name:
                notify(
                    f"data: {path} is in {other} and in {name}: text that validates in one source "
                    "may be trained on in the other"
                )
                return


def refuse_weights(data: str | Sequence[str], command: str) -> None:
    """Raise a UserError if ``data`` has weights, which are for training.

    Args:
        data: what ``--data`` was given.
        command: the command, which takes none.
    """
    if split_weights(data) is not None:
        raise UserError(f"data: weights (NAME:WEIGHT) are for training; {command} takes none")


def absolute_item(item: str) -> str:
    """``item`` with an absolute path or pattern, and its weight as it was written.

    Args:
        item: one element of ``--data``.
    """
    name, weight = split_weight(item)
    return absolute(item) if weight is None else absolute(name) + item[len(name) :]


def item_paths(item: str) -> list[Path]:
    """The files and folders that an item of ``--data`` needs.

    Args:
        item: a name, with or without a weight.
    """
    return corpus_paths(split_weight(item)[0])
