"""Tokens to batches: the book's sliding window, and the training and evaluation streams."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from fastgpt2.errors import UserError
from fastgpt2.text.encoding import Tokenizer, encode_special
from fastgpt2.text.packing import IGNORE_INDEX, inside_documents
from fastgpt2.text.permutation import Permutation
from fastgpt2.text.stored import JoinedTokens, StoredTokens, TokenSequence, check_ids
from fastgpt2.text.tokenizers import get_tokenizer

Tokens = TokenSequence | torch.Tensor | Sequence[int]
Batch = tuple[torch.Tensor, torch.Tensor]


def as_sequence(
    tokens: Tokens, *, at_least: int, vocab_size: int | None, name: str
) -> TokenSequence:
    """``tokens`` as a sequence that can be sliced, checked before the first step.

    Raises:
        UserError: fewer than ``at_least`` ids, not one-dimensional, or an id outside
            [0, vocab_size).
    """
    if isinstance(tokens, StoredTokens | JoinedTokens):
        sequence: TokenSequence = tokens
    else:
        sequence = np.asarray(tokens)
    if isinstance(sequence, np.ndarray) and sequence.ndim != 1:
        raise UserError(f"{name}: expected ids in one dimension, got shape {sequence.shape}")
    if len(sequence) < at_least:
        raise UserError(
            f"{name}: too short: {len(sequence)} tokens, at least {at_least} are needed (a block "
            "and the token after it)"
        )
    if vocab_size is None:
        return sequence
    if isinstance(sequence, JoinedTokens):
        for part in sequence.tokens:
            as_sequence(part, at_least=0, vocab_size=vocab_size, name=name)
    elif isinstance(sequence, np.ndarray):
        check_ids(sequence, vocab_size, name)
    elif sequence.vocab_size > vocab_size:
        # stored tokens check each id against their own vocabulary when it is read
        raise UserError(
            f"{name}: {sequence.kind}s of a vocabulary of {sequence.vocab_size} for a model of "
            f"{vocab_size}"
        )
    return sequence


class BlockStream(ABC):
    """An endless stream of training batches, each a pure function of its place in the stream.

    Its state is one number, the blocks used so far. Resuming is exact and keeps the order, even
    with another batch size or number of processes.

    Args:
        block_size: T, tokens.
        batch_size: B, blocks per batch and process.
        blocks_per_epoch: blocks in one pass over the data.
        rank, world_size: this process and the number of processes; each gets different blocks.
        eot: the id that ends a document; its target, the next document's first token, is ignored.
            None ignores no target.
    """

    def __init__(
        self,
        block_size: int,
        batch_size: int,
        blocks_per_epoch: int,
        rank: int,
        world_size: int,
        eot: int | None,
    ) -> None:
        self.block_size = block_size
        self.batch_size = batch_size
        self.blocks_per_epoch = blocks_per_epoch
        self._rank = rank
        self._world_size = world_size
        self._eot = eot
        self._position = 0

    @abstractmethod
    def blocks(self, first: int, count: int) -> NDArray[Any]:
        """``count`` blocks of the stream, from place ``first``, (count, T + 1).

        A block has T inputs and the token after them.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, int]:
        """The place in the stream, and the settings it is valid for; plain integers."""

    @property
    def tokens_per_epoch(self) -> int:
        """Targets in one epoch, over all processes."""
        return self.blocks_per_epoch * self.block_size

    @property
    def steps_per_epoch(self) -> int:
        """Batches per process until all blocks were used once, rounded up."""
        return -(-self.blocks_per_epoch // self.blocks_per_step)

    @property
    def blocks_used(self) -> int:
        """Blocks taken from the stream so far, over all processes."""
        return self._position

    @property
    def epoch(self) -> float:
        """Epochs completed, with the fraction of the current one."""
        return self._position / self.blocks_per_epoch

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """Inputs and targets, int64 ``(B, T)`` each."""
        batch = self.batch_at(self._position)
        self.advance()
        return batch

    @property
    def blocks_per_step(self) -> int:
        """Blocks in one batch of every process."""
        return self._world_size * self.batch_size

    def advance(self) -> None:
        """Move the place in the stream by one batch of every process."""
        self._position += self.blocks_per_step

    def batch_at(self, place: int) -> Batch:
        """This process's batch at ``place``, without moving the stream.

        Args:
            place: blocks before the batch, over all processes.

        Returns:
            Inputs and targets, int64 ``(B, T)`` each.
        """
        first = place + self._rank * self.batch_size
        batch = torch.from_numpy(self.blocks(first, self.batch_size).astype(np.int64))
        idx, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        return idx, targets if self._eot is None else inside_documents(idx, targets, self._eot)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the place where ``state_dict`` was taken.

        Raises:
            UserError: the state belongs to another seed, block size or number of tokens.
        """
        for key, ours in self.state_dict().items():
            if key != "position" and state.get(key) != ours:
                raise UserError(
                    f"resume: the data stream was saved with {key} {state.get(key)}, "
                    f"now it is {ours}"
                )
        self._position = state["position"]


class BlockLoader(BlockStream):
    """The stream of one corpus.

    N tokens hold n = (N - 1) // T blocks of T inputs and T targets (the inputs shifted by one).
    Each epoch uses the n blocks once, in its own random order. The borders between blocks are
    shifted by a random 0 to T - 1 tokens per epoch (the last block is moved back to fit). With a
    ``stride``, the blocks are the same in each epoch and begin ``stride`` tokens apart, so they
    overlap if it is less than T. Epochs follow without a gap: a batch may hold the end of one and
    the beginning of the next. Nothing is dropped, and a corpus with fewer blocks than a batch works
    too.

    Order and borders depend only on ``seed`` and the number of the epoch.

    Args:
        tokens: ids; numpy array, tensor or ``TokenShards``.
        block_size: T, tokens.
        batch_size: B, blocks per batch and process.
        seed: decides order and borders.
        rank, world_size: this process and the number of processes; each gets different blocks.
        stride: tokens from one block to the next; None is T, with shifted borders.
        vocab_size: V; ids are checked against it, if given.
        eot: the id that ends a document; its target, the next document's first token, is ignored.
            None ignores no target.
        name: what error messages call the tokens.

    Raises:
        UserError: fewer than T + 1 tokens, or an id outside the vocabulary.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        block_size: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        stride: int | None = None,
        vocab_size: int | None = None,
        eot: int | None = None,
        name: str = "training tokens",
    ) -> None:
        self._stride = block_size if stride is None else stride
        if min(block_size, batch_size, self._stride) < 1 or not 0 <= rank < world_size:
            raise ValueError(
                "BlockLoader: needs block_size, batch_size, stride >= 1 and 0 <= rank < "
                f"world_size, got {block_size}, {batch_size}, {stride}, {rank}, {world_size}"
            )
        self._tokens = as_sequence(
            tokens, at_least=block_size + 1, vocab_size=vocab_size, name=name
        )
        blocks_per_epoch = 1 + (len(self._tokens) - 1 - block_size) // self._stride
        super().__init__(block_size, batch_size, blocks_per_epoch, rank, world_size, eot)
        self._seed = seed
        self._random_phase = stride is None

    def blocks(self, first: int, count: int) -> NDArray[Any]:
        """``count`` blocks of the stream, from place ``first``, (count, T + 1)."""
        starts = self._starts(np.arange(first, first + count)).tolist()
        return np.stack([self._tokens[s : s + self.block_size + 1] for s in starts])

    def _starts(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index of the first token of the blocks at these places of the endless stream."""
        starts = np.empty_like(places)
        epochs, within = np.divmod(places, self.blocks_per_epoch)
        for epoch in np.unique(epochs):
            order = Permutation(self.blocks_per_epoch, seed=(self._seed, int(epoch)))
            phase = order.extra % self.block_size if self._random_phase else 0
            chosen = epochs == epoch
            starts[chosen] = order(within[chosen]) * self._stride + phase
        return np.minimum(starts, len(self._tokens) - 1 - self.block_size)

    def state_dict(self) -> dict[str, int]:
        """The place in the stream, and the settings it is valid for; plain integers."""
        return {
            "position": self._position,
            "seed": self._seed,
            "block_size": self.block_size,
            "num_tokens": len(self._tokens),
        }


def iter_eval_batches(
    tokens: Tokens,
    block_size: int,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    vocab_size: int | None = None,
    name: str = "validation tokens",
) -> Iterator[Batch]:
    """All tokens once, in order: every token but the first is a target exactly once.

    Inputs and targets are int64 ``(B, T)``, always the same shape, so that a compiled model is not
    compiled again; positions after the last token have input 0 and target -100. With several
    processes, each gets different batches, and all get the same number: the last may have no
    target.

    Args:
        tokens: the ids, (N,).
        block_size: T, tokens per row.
        batch_size: B, rows per batch; fewer if the tokens need fewer.
        rank: this process, from 0.
        world_size: number of processes.
        vocab_size: V; ids are checked against it, if given.
        name: what error messages call the tokens.

    Raises:
        UserError: fewer than two tokens, or an id outside the vocabulary.
    """
    sequence = as_sequence(tokens, at_least=2, vocab_size=vocab_size, name=name)
    targets = len(sequence) - 1
    rows = min(batch_size, -(-targets // block_size))
    return _eval_batches(sequence, block_size, rows, rank, world_size)


def check_eval_tokens(
    tokens: Tokens, vocab_size: int | None, *, name: str = "validation tokens"
) -> None:
    """Raise now what ``iter_eval_batches`` would raise later.

    Args:
        tokens: ids; numpy array, tensor or ``TokenShards``.
        vocab_size: V; ids are checked against it, if given.
        name: what error messages call the tokens.

    Raises:
        UserError: fewer than two tokens, or an id outside the vocabulary.
    """
    as_sequence(tokens, at_least=2, vocab_size=vocab_size, name=name)


def _eval_batches(
    sequence: TokenSequence, block_size: int, rows: int, rank: int, world_size: int
) -> Iterator[Batch]:
    count = rows * block_size
    for round_start in range(0, len(sequence) - 1, world_size * count):
        start = round_start + rank * count
        ids = torch.from_numpy(sequence[start : start + count + 1].astype(np.int64))
        used = max(0, len(ids) - 1)
        idx = torch.zeros(count, dtype=torch.int64)
        targets = torch.full((count,), IGNORE_INDEX)
        idx[:used] = ids[:used]
        targets[:used] = ids[1:]
        yield idx.view(rows, block_size), targets.view(rows, block_size)


class SlidingWindows(TorchDataset[Batch]):
    """Windows of ``max_length`` tokens, one every ``stride`` tokens, with their targets."""

    def __init__(self, tokens: TokenSequence, max_length: int, stride: int) -> None:
        self._tokens = tokens
        self._max_length = max_length
        self._stride = stride

    def __len__(self) -> int:
        return max(0, -(-(len(self._tokens) - self._max_length) // self._stride))

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self._stride
        window = torch.from_numpy(
            self._tokens[start : start + self._max_length + 1].astype(np.int64)
        )
        return window[:-1], window[1:]


def create_dataloader(
    text_or_tokens: str | Tokens,
    batch_size: int = 4,
    max_length: int = 256,
    stride: int = 128,
    shuffle: bool = True,
    drop_last: bool = True,
    *,
    tokenizer: Tokenizer | None = None,
    num_workers: int = 0,
) -> DataLoader[Batch]:
    """Batches of overlapping windows, as in Raschka, "Build a Large Language Model", chapter 2.

    Window i has the inputs ``tokens[i * stride : i * stride + max_length]``; its targets are
    shifted by one token.

    Args:
        text_or_tokens: a text, in which ``<|endoftext|>`` is one token, or token ids.
        batch_size: B, windows in a batch.
        max_length: T, tokens in a window.
        stride: tokens from one window to the next; ``max_length`` for no overlap.
        shuffle: a new random order each epoch (torch's global generator).
        drop_last: leave out a last batch with fewer than ``batch_size`` windows.
        tokenizer: encodes a text; GPT-2's if None.
        num_workers: processes of the ``DataLoader``.

    Returns:
        a ``DataLoader`` of pairs (inputs, targets), int64 ``(B, T)`` each.

    Raises:
        UserError: the text is too short for one batch.
    """
    if batch_size < 1 or max_length < 1 or stride < 1:
        raise ValueError(
            "create_dataloader: batch_size, max_length and stride must be positive, got "
            f"{batch_size}, {max_length} and {stride}"
        )
    if isinstance(text_or_tokens, str):
        tokenizer = tokenizer or get_tokenizer("gpt2")
        tokens: Tokens = np.asarray(encode_special(tokenizer, text_or_tokens), np.int64)
    else:
        tokens = text_or_tokens
    sequence = as_sequence(
        tokens, at_least=max_length + 1, vocab_size=None, name="create_dataloader"
    )
    windows = SlidingWindows(sequence, max_length, stride)
    if drop_last and len(windows) < batch_size:
        raise UserError(
            f"create_dataloader: {len(sequence)} tokens make {len(windows)} windows, fewer than "
            f"one batch of {batch_size}, and drop_last leaves none"
        )
    return DataLoader(
        windows, batch_size, shuffle=shuffle, drop_last=drop_last, num_workers=num_workers
    )
