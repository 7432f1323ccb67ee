"""What the ways to generate have in common: checks of prompts and stops, the window, the seeds."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import index
from typing import Any, Protocol

import torch

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.generate.processors import is_count, plain, require
from fastgpt2.model import GPT

Stop = str | int | Iterable[str | int]
# crop is nanoGPT's way: each token sees the last block_size ones, all recomputed for it
WINDOWS = ("slide", "stop", "crop")


class Configured(Protocol):
    """A model, or one whose weights have not been read."""

    @property
    def config(self) -> GPTConfig:
        """Its shape."""


def as_ids(prompt: Any) -> list[int]:
    """Token ids as a list; NumPy's integers and a tensor's become Python's.

    Raises:
        UserError: it holds anything but integers.
    """
    try:
        ids = [index(id_) for id_ in prompt]
    except TypeError:
        raise UserError(f"prompt: expected text or token ids, got {prompt!r:.80}") from None
    return ids


def stops_of(stop: Stop) -> list[str | int]:
    """One stop or several, as a list; NumPy's integers and a tensor's become Python's."""
    value: Any = plain(stop)
    several = isinstance(value, Iterable) and not isinstance(value, str)
    return [plain(item) for item in value] if several else [value]


def split_stops(model: Configured, stop: Stop) -> tuple[frozenset[int], frozenset[str]]:
    """The ids and the strings that end a text, each once.

    Raises:
        UserError: one is empty, not in the vocabulary, or neither.
    """
    stops = stops_of(stop)
    for item in stops:
        if isinstance(item, bool) or not isinstance(item, str | int):
            raise UserError(f"stop: expected token ids and strings, got {item!r:.80}")
        if item == "":
            raise UserError("stop: a stop string must not be empty")
        if isinstance(item, int) and not 0 <= item < model.config.vocab_size:
            raise UserError(f"stop: id {item} is not in [0, {model.config.vocab_size})")
    ids = frozenset(item for item in stops if isinstance(item, int))
    return ids, frozenset(item for item in stops if isinstance(item, str))


def check_prompt(model: Configured, ids: Sequence[int], window: str) -> None:
    """Refuse a prompt that the model cannot continue.

    Raises:
        UserError: it is empty, an id is not in the vocabulary, or it does not fit into a window
            that stops.
    """
    vocab_size, block_size = model.config.vocab_size, model.config.block_size
    if not ids:
        raise UserError("prompt: must hold at least one token")
    strange = [id_ for id_ in ids if not 0 <= id_ < vocab_size]
    if strange:
        raise UserError(f"prompt: id {strange[0]} is not in [0, {vocab_size}), the vocabulary")
    if window == "stop" and len(ids) > block_size:
        raise UserError(
            f"prompt: {len(ids)} tokens, but the model's window holds {block_size}; "
            "window 'slide' goes on with the last ones"
        )


@contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """Within the block, the model is in evaluation mode; afterwards each module in its own."""
    modes = [(module, module.training) for module in model.modules()] if model.training else []
    if modes:
        model.eval()
    try:
        yield
    finally:
        # a module that stays in evaluation mode while the others train is left so
        for module, mode in modes:
            module.training = mode


def kept_tokens(model: GPT, window: str) -> int:
    """How many tokens are kept when a text outgrows the window.

    Raises:
        UserError: there is no such policy.
    """
    if window not in WINDOWS:
        raise UserError(f"window must be one of {', '.join(WINDOWS)}, got {window!r:.80}")
    block_size = model.config.block_size
    return block_size if window == "crop" else max(1, block_size // 2)


def check_generator(generator: object) -> None:
    """Refuse a source of random numbers of another library.

    Raises:
        UserError: it is neither None nor a ``torch.Generator``.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise UserError(f"generator: expected a torch.Generator, got {generator!r:.80}")


def row_generator(device: torch.device, seed: int | None) -> torch.Generator:
    """A source of random numbers for one row; None means a new seed."""
    seed = plain(seed)
    if seed is not None:
        require("seed", seed, is_count(seed, 0) and seed < 2**63, "an integer in [0, 2^63)")
    generator = torch.Generator(device)
    generator.manual_seed(generator.seed() if seed is None else seed)
    return generator
