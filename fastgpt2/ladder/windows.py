"""Rung 3: what the model reads and what it must say, cut from the tokens by a sliding window."""

from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastgpt2.text import create_dataloader, get_tokenizer
from fastgpt2.text.encoding import encode_special

__all__ = ["Encoder", "GPTDatasetV1", "create_dataloader", "create_dataloader_v1"]


class Encoder(Protocol):
    """Anything with ``encode`` and ``decode``: a tokenizer of this package, or tiktoken's."""

    def encode(self, text: str, /) -> list[int]:
        """Ids of ``text``."""

    def decode(self, ids: list[int], /) -> str:
        """Text of ``ids``."""


class GPTDatasetV1(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text: ``max_length`` tokens, and the same moved on by one as their targets.

    All windows are kept in memory; ``create_dataloader``, the next rung, cuts them as they are
    asked for and hands them out in batches.

    Args:
        txt: the text; ``<|endoftext|>`` in it is one token.
        tokenizer: what turns it into ids.
        max_length: T, tokens in a window.
        stride: tokens from the start of a window to the start of the next.
    """

    def __init__(self, txt: str, tokenizer: Encoder, max_length: int, stride: int) -> None:
        ids = torch.tensor(encode_special(tokenizer, txt))
        starts = range(0, len(ids) - max_length, stride)
        self.input_ids = [ids[start : start + max_length] for start in starts]
        self.target_ids = [ids[start + 1 : start + 1 + max_length] for start in starts]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.input_ids[index], self.target_ids[index]


def create_dataloader_v1(
    txt: str,
    batch_size: int = 4,
    max_length: int = 256,
    stride: int = 128,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """The book's loader: batches of ``GPTDatasetV1`` over GPT-2's tokens.

    Args:
        txt: the text; ``<|endoftext|>`` in it is one token.
        batch_size: B, windows in a batch.
        max_length: T, tokens in a window.
        stride: tokens from the start of a window to the start of the next.
        shuffle: a new random order each epoch.
        drop_last: leave out a last batch with fewer than ``batch_size`` windows.
        num_workers: processes that load.

    Returns:
        batches (inputs, targets), int64 (B, T) each.

    Raises:
        UserError: GPT-2's vocabulary is missing.
    """
    dataset = GPTDatasetV1(txt, get_tokenizer("gpt2"), max_length, stride)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
    )
