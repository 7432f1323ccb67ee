"""The formats that ``prepare --to`` writes: ours, llm.c's, nanoGPT's."""

import hashlib
import pickle
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import ArrayLike

from fastgpt2.errors import UserError
from fastgpt2.files import atomic_path
from fastgpt2.text.encoding import Tokenizer
from fastgpt2.text.shards import SUFFIX, create_shard
from fastgpt2.text.stored import check_ids
from fastgpt2.text.token_files import (
    LLMC_HEADER_BYTES,
    LLMC_MAGIC,
    LLMC_VERSION,
    NANOGPT_META,
    UINT16,
)
from fastgpt2.text.tokenizers import CharTokenizer


class IdWriter(Protocol):
    """Appends ids to a file."""

    count: int

    def write(self, ids: ArrayLike) -> None:
        """Append ids; a UserError names one that is not in the vocabulary."""

    @property
    def sha256(self) -> bytes:
        """Of the ids written so far, in the file's type."""


@dataclass(frozen=True)
class TokenFormat:
    """How a program wants its tokens.

    Attributes:
        create: a file for a path and a tokenizer; it appears when the ``with`` block ends well.
        name: of the file, for a split and its number.
        most_tokens: that a file can hold; None is any number.
        one_file: whether a split is one file.
    """

    create: Callable[[Path, Tokenizer], AbstractContextManager[IdWriter]]
    name: Callable[[str, int], str]
    most_tokens: int | None = None
    one_file: bool = False


class _Uint16Writer:
    """Ids as uint16, little-endian."""

    def __init__(self, file: BinaryIO, name: str, tokenizer: Tokenizer) -> None:
        self.count = 0
        self._file, self._name = file, name
        self._vocab_size = tokenizer.vocab_size
        self._digest = hashlib.sha256()
        if self._vocab_size > 1 << 16:
            raise UserError(f"{name}: uint16 cannot hold the vocabulary of {self._vocab_size}")

    def write(self, ids: ArrayLike) -> None:
        """Append ids; a UserError names one that is not in the vocabulary."""
        array = np.asarray(ids)
        check_ids(array, self._vocab_size, self._name, first=self.count)
        data = array.astype(UINT16).tobytes()
        self._digest.update(data)
        self._file.write(data)
        self.count += array.size

    @property
    def sha256(self) -> bytes:
        """Of the ids written so far."""
        return self._digest.digest()


@contextmanager
def create_llmc(path: Path, tokenizer: Tokenizer) -> Iterator[IdWriter]:
    """A file of llm.c (karpathy/llm.c, dev/data/data_common.py): header, then uint16 ids.

    Args:
        path: the file.
        tokenizer: whose ids it holds; the format does not say which.

    Raises:
        UserError: the vocabulary does not fit uint16.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(bytes(LLMC_HEADER_BYTES))
        writer = _Uint16Writer(file, f"token file {path}", tokenizer)
        yield writer
        file.seek(0)
        file.write(struct.pack("<3i", LLMC_MAGIC, LLMC_VERSION, writer.count))


@contextmanager
def create_nanogpt(path: Path, tokenizer: Tokenizer) -> Iterator[IdWriter]:
    """A file of nanoGPT (karpathy/nanoGPT, data/*/prepare.py): uint16 ids alone.

    Beside ids of characters lies ``meta.pkl``, from which nanoGPT takes the vocabulary.

    Args:
        path: the file.
        tokenizer: whose ids it holds.

    Raises:
        UserError: the vocabulary does not fit uint16.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield _Uint16Writer(file, f"token file {path}", tokenizer)
    if isinstance(tokenizer, CharTokenizer):
        stoi = {char: id_ for id_, char in enumerate(tokenizer.chars)}
        meta = {
            "vocab_size": tokenizer.vocab_size,
            "itos": dict(enumerate(tokenizer.chars)),
            "stoi": stoi,
        }
        with atomic_path(path.with_name(NANOGPT_META)) as temporary:
            temporary.write_bytes(pickle.dumps(meta))


TOKEN_FORMATS = {
    "fastgpt2": TokenFormat(create_shard, lambda split, n: f"{split}-{n:05d}{SUFFIX}"),
    "llmc": TokenFormat(
        create_llmc, lambda split, n: f"{split}_{n:06d}.bin", most_tokens=2**31 - 1
    ),
    "nanogpt": TokenFormat(create_nanogpt, lambda split, n: f"{split}.bin", one_file=True),
}
