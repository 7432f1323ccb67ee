"""From what ``--data`` says to the tokens of a training run."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgpt2.errors import UserError
from fastgpt2.text.corpora import VAL_FRACTION, load_corpus, split_pieces
from fastgpt2.text.documents import TEXT_COLUMN
from fastgpt2.text.encoding import Tokenizer
from fastgpt2.text.prepared import find_prepared, open_prepared
from fastgpt2.text.shards import TokenShards, dtype_for
from fastgpt2.text.tokenizers import get_tokenizer


@dataclass(frozen=True)
class Dataset:
    """Training and validation tokens, and what is needed to read them.

    ``train_bytes`` and ``val_bytes`` are the UTF-8 bytes of the two texts: nats per token times
    ``len(val) / val_bytes`` are nats per byte, whatever the tokenizer. ``val`` is None when nothing
    is kept for validation.
    """

    train: NDArray[Any] | TokenShards
    val: NDArray[Any] | TokenShards | None
    tokenizer: Tokenizer
    train_bytes: int
    val_bytes: int
    source: str

    @cached_property
    def digest(self) -> str:
        """Short sha256 of all tokens: equal digests mean the same corpus, wherever it lies.

        A folder of token shards and the text it was made from have different digests.
        """
        digest = hashlib.sha256()
        for tokens in (self.train, self.val):
            if isinstance(tokens, TokenShards):
                for header in tokens.headers:
                    digest.update(header.sha256)
            elif tokens is not None:
                digest.update(np.ascontiguousarray(tokens).data)
            # the place of the border between the two
            digest.update(b"split")
        return digest.hexdigest()[:16]


def build_dataset(
    data: str | Sequence[str],
    tokenizer: str | Tokenizer = "auto",
    *,
    vocab_dir: str | Path | None = None,
    val_fraction: float = VAL_FRACTION,
    text_column: str = TEXT_COLUMN,
    notify: Callable[[str], None] | None = None,
) -> Dataset:
    """Read and tokenize a corpus, or open and verify one that ``fastgpt2.prepare`` tokenized.

    Args:
        data: files, folders, glob patterns, corpus names (see ``load_corpus``), or one folder of
            token shards.
        tokenizer: a name for ``get_tokenizer``, or the tokenizer itself (of a run that resumes).
        vocab_dir: folder with GPT-2's vocabulary files.
        val_fraction: the last part of the text, kept for validation; shards have theirs.
        text_column: where a line of JSON or a table has its text.
        notify: called with lines that a person should see.

    Raises:
        UserError: anything wrong with the data, in one line.
    """
    if folder := find_prepared(data):
        return _prepared_dataset(folder, tokenizer)
    corpus = load_corpus(data, text_column=text_column)
    if isinstance(tokenizer, str):
        tokenizer = get_tokenizer(
            tokenizer, vocab_dir=vocab_dir, text=corpus.pieces(), notify=notify
        )
    dtype = dtype_for(tokenizer.vocab_size)
    parts: dict[str, list[NDArray[Any]]] = {"train": [], "val": []}
    size = {"train": 0, "val": 0}
    for piece in split_pieces(corpus, val_fraction):
        into = parts[piece.split]
        if piece.after_document and tokenizer.eot is not None:
            into.append(np.array([tokenizer.eot], dtype))
        into.append(np.array(tokenizer.encode(piece.text), dtype))
        size[piece.split] += len(piece.text.encode("utf-8"))
    tokens = {split: np.concatenate(p) if p else np.empty(0, dtype) for split, p in parts.items()}
    return Dataset(
        train=tokens["train"],
        val=tokens["val"] if parts["val"] else None,
        tokenizer=tokenizer,
        train_bytes=size["train"],
        val_bytes=size["val"],
        source=corpus.source,
    )


def _prepared_dataset(folder: Path, wanted: str | Tokenizer) -> Dataset:
    prepared = open_prepared(folder)
    tokenizer = prepared.tokenizer
    # damage should show now, not after hours of training
    for shards in prepared.tokens.values():
        shards.verify()
    if isinstance(wanted, str):
        fits = wanted in ("auto", tokenizer.name)
    else:
        fits = wanted.fingerprint == tokenizer.fingerprint
    if not fits:
        name = wanted if isinstance(wanted, str) else f"{wanted.name} {wanted.fingerprint}"
        raise UserError(
            f"data: {folder} was made with the tokenizer {tokenizer.name} "
            f"{tokenizer.fingerprint}, not with {name}"
        )
    return Dataset(
        train=prepared.tokens["train"],
        val=prepared.tokens.get("val"),
        tokenizer=tokenizer,
        train_bytes=prepared.bytes["train"],
        val_bytes=prepared.bytes.get("val", 0),
        source=str(folder),
    )
