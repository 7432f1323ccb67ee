"""The formats that ``prepare --to`` writes: ours, llm.c's, nanoGPT's."""

import pickle
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastgpt2.errors import UserError
from fastgpt2.files import atomic_path
from fastgpt2.text.encoding import Tokenizer
from fastgpt2.text.shards import SUFFIX, IdWriter, create_shard
from fastgpt2.text.token_files import (
    LLMC_HEADER_BYTES,
    LLMC_MAGIC,
    LLMC_VERSION,
    NANOGPT_META,
    UINT16,
)
from fastgpt2.text.tokenizers import CharTokenizer


@dataclass(frozen=True)
class TokenFormat:
    """How a program stores tokens.

    Attributes:
        create: opens a file for a path and a tokenizer; it appears if the ``with`` block succeeds.
        name: file name for a split and the number of the file.
        most_tokens: ids that a file can hold; None means any number.
        one_file: whether a split is one file.
    """

    create: Callable[[Path, Tokenizer], AbstractContextManager[IdWriter]]
    name: Callable[[str, int], str]
    most_tokens: int | None = None
    one_file: bool = False


def _uint16_writer(file: BinaryIO, path: Path, tokenizer: Tokenizer) -> IdWriter:
    name = f"token file {path}"
    if tokenizer.vocab_size > 1 << 16:
        raise UserError(f"{name}: uint16 cannot hold the vocabulary of {tokenizer.vocab_size}")
    return IdWriter(file, name, tokenizer.vocab_size, UINT16)


@contextmanager
def create_llmc(path: Path, tokenizer: Tokenizer) -> Iterator[IdWriter]:
    """A file of llm.c (karpathy/llm.c, dev/data/data_common.py): header, then uint16 ids.

    Args:
        path: the file.
        tokenizer: whose ids it holds; the format does not record it.

    Raises:
        UserError: the vocabulary does not fit uint16.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(bytes(LLMC_HEADER_BYTES))
        writer = _uint16_writer(file, path, tokenizer)
        yield writer
        file.seek(0)
        file.write(struct.pack("<3i", LLMC_MAGIC, LLMC_VERSION, writer.count))


@contextmanager
def create_nanogpt(path: Path, tokenizer: Tokenizer) -> Iterator[IdWriter]:
    """A file of nanoGPT (karpathy/nanoGPT, data/*/prepare.py): uint16 ids and nothing else.

    For ids of characters, ``meta.pkl`` is written too: nanoGPT reads the vocabulary from it.

    Args:
        path: the file.
        tokenizer: whose ids it holds.

    Raises:
        UserError: the vocabulary does not fit uint16.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield _uint16_writer(file, path, tokenizer)
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
