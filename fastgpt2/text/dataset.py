"""Turn what ``--data`` names into the tokens of a training run."""

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
from fastgpt2.text.encoding import Tokenizer, token_bytes
from fastgpt2.text.mixture import Mixture, check_distinct, split_weights
from fastgpt2.text.prepared import find_prepared, open_prepared
from fastgpt2.text.shards import TokenShards, dtype_for
from fastgpt2.text.stored import BLOCK_IDS, JoinedTokens, StoredTokens, TokenSequence
from fastgpt2.text.token_files import (
    FoundFiles,
    check_headers,
    find_token_files,
    open_token_files,
    tokenizer_of,
)
from fastgpt2.text.tokenizers import get_tokenizer


@dataclass(frozen=True)
class Dataset:
    """Training and validation tokens with their tokenizer.

    ``train_bytes`` and ``val_bytes`` are the UTF-8 bytes of the two texts, 0 if the ids have no
    text: nats per token times ``len(val) / val_bytes`` are nats per byte, for any tokenizer.
    ``val`` is None when nothing is kept for validation.
    """

    train: TokenSequence
    val: TokenSequence | None
    tokenizer: Tokenizer
    train_bytes: int
    val_bytes: int
    source: str

    @cached_property
    def first_bytes(self) -> int:
        """UTF-8 bytes of the validation tokens that directly follow an end-of-text id.

        Each begins a document. If documents are scored alone, nothing predicts these tokens.
        """
        eot, total, previous = self.tokenizer.eot, 0, np.empty(0, np.int64)
        if self.val is None or eot is None:
            return 0
        lengths = token_bytes(self.tokenizer)
        for start in range(0, len(self.val), BLOCK_IDS):
            ids = np.concatenate([previous, self.val[start : start + BLOCK_IDS]])
            total += int(lengths[ids[1:][ids[:-1] == eot]].sum())
            previous = ids[-1:]
        return total

    @cached_property
    def digest(self) -> str:
        """Short sha256 of all tokens: equal digests mean the same corpus, whatever its path.

        A folder of token shards and the text it was made from have different digests.
        """
        digest = hashlib.sha256()
        if isinstance(self.train, Mixture):
            digest.update(repr(self.train.weights).encode())
        parts: list[NDArray[Any] | StoredTokens | None] = []
        for split in (self.train, self.val):
            parts += split.leaves() if isinstance(split, JoinedTokens) else [split]
        for tokens in parts:
            if isinstance(tokens, TokenShards):
                for header in tokens.headers:
                    digest.update(header.sha256)
            elif isinstance(tokens, StoredTokens):
                assert tokens.sha256 is not None, "not checked"
                digest.update(tokens.sha256)
            elif tokens is not None:
                digest.update(np.ascontiguousarray(tokens).data)
            # marks the border between the two splits
            digest.update(b"split")
        return digest.hexdigest()[:16]


def build_dataset(
    data: str | Sequence[str],
    tokenizer: str | Tokenizer = "auto",
    *,
    vocab_dir: str | Path | None = None,
    val_fraction: float = VAL_FRACTION,
    text_column: str = TEXT_COLUMN,
    vocab_size: int | None = None,
    notify: Callable[[str], None] | None = None,
) -> Dataset:
    """Read and tokenize a corpus, or open and verify a tokenized one.

    Args:
        data: files, folders, glob patterns, corpus names (see ``load_corpus``), one folder of
            token shards of ``fastgpt2.prepare``, or token files of llm.c or nanoGPT. With weights
            (``a.txt:0.3``), each of these is one source of a mixture.
        tokenizer: a name for ``get_tokenizer``, or a tokenizer (when a run resumes).
        vocab_dir: folder with GPT-2's vocabulary files.
        val_fraction: share of the text, at its end, kept for validation; ignored for shards and for
            token files whose names say which part validates.
        text_column: key of a JSON line, or column of a table, that holds the text.
        vocab_size: V of token files whose tokenizer is not known.
        notify: called with lines that the user should see.

    Raises:
        UserError: anything wrong with the data, in one line.
    """
    notify = notify or (lambda line: None)
    if weighted := split_weights(data):
        return _mixed_dataset(
            *weighted,
            tokenizer,
            notify,
            vocab_dir=vocab_dir,
            val_fraction=val_fraction,
            text_column=text_column,
            vocab_size=vocab_size,
        )
    if folder := find_prepared(data):
        dataset = _prepared_dataset(folder, tokenizer)
        if vocab_size not in (None, dataset.tokenizer.vocab_size):
            raise UserError(
                f"--vocab-size {vocab_size}: {folder} holds ids of {dataset.tokenizer.name} "
                f"({dataset.tokenizer.vocab_size} ids)"
            )
        return dataset
    if found := find_token_files(data):
        check_headers(found)
        chosen = tokenizer_of(
            found, tokenizer, vocab_dir=vocab_dir, vocab_size=vocab_size, notify=notify
        )
        return _token_dataset(found, chosen, val_fraction, notify)
    if isinstance(tokenizer, str):
        refuse_vocab_size(vocab_size)
    corpus = load_corpus(data, text_column=text_column, notify=notify)
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


def refuse_vocab_size(vocab_size: int | None) -> None:
    """Raise a UserError if ``--vocab-size`` was given for text, whose tokenizer has its own.

    Args:
        vocab_size: the value of the flag.
    """
    if vocab_size is not None:
        raise UserError(f"--vocab-size {vocab_size}: is for token files, and the data are text")


def _prepared_dataset(folder: Path, wanted: str | Tokenizer) -> Dataset:
    prepared = open_prepared(folder)
    tokenizer = prepared.tokenizer
    # find damage now, not after hours of training
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


def _token_dataset(
    found: FoundFiles, tokenizer: Tokenizer, val_fraction: float, notify: Callable[[str], None]
) -> Dataset:
    train, val = open_token_files(found, tokenizer.vocab_size)
    if val is None and val_fraction > 0:
        border = int(len(train) * (1 - val_fraction))
        train, val = train.part(0, border), train.part(border)
        notify(
            f"data: no token file is named as validation: the last {val_fraction:.3g} of the ids"
        )
    if found.left_out:
        notify(f"data: left out {len(found.left_out)} files without ids ({found.left_out[0]}, ...)")
    lengths = token_bytes(tokenizer)
    sizes = {}
    # check every id now, not after hours of training
    for name, tokens in (("train", train), ("val", val)):
        sizes[name] = 0 if tokens is None else tokens.check(lengths)
    paths = [str(path) for path in found.all]
    return Dataset(
        train=train,
        val=val,
        tokenizer=tokenizer,
        train_bytes=sizes["train"],
        val_bytes=sizes["val"],
        source=paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more token files",
    )


def _mixed_dataset(
    names: list[str],
    weights: list[float],
    tokenizer: str | Tokenizer,
    notify: Callable[[str], None],
    **options: Any,
) -> Dataset:
    check_distinct(names, notify)
    for path in map(Path, names):
        if path.exists() and not (path.is_file() or path.is_dir()):
            # the tokenizer is chosen before the tokens are made
            raise UserError(f"data: {path} can be read only once; write it to a file to mix it")
    if isinstance(tokenizer, str):
        texts = [name for name in names if not (find_prepared(name) or find_token_files(name))]
        tokens = [name for name in names if name not in texts]
        if tokens:
            # encode the text with the tokenizer of the tokens
            tokenizer = build_dataset(tokens[0], tokenizer, notify=notify, **options).tokenizer
        else:
            refuse_vocab_size(options["vocab_size"])
            corpus = load_corpus(texts, text_column=options["text_column"])
            tokenizer = get_tokenizer(
                tokenizer, vocab_dir=options["vocab_dir"], text=corpus.pieces(), notify=notify
            )
    options |= {"vocab_dir": None, "vocab_size": None}
    parts = [build_dataset(name, tokenizer, notify=notify, **options) for name in names]
    validation = [_ended(part.val, tokenizer) for part in parts if part.val is not None]
    return Dataset(
        train=Mixture(
            tuple(_ended(part.train, tokenizer) for part in parts), tuple(names), tuple(weights)
        ),
        val=JoinedTokens(tuple(validation)) if validation else None,
        tokenizer=tokenizer,
        train_bytes=sum(part.train_bytes for part in parts),
        val_bytes=sum(part.val_bytes for part in parts),
        source=", ".join(
            f"{name} ({weight:.1%})" for name, weight in zip(names, weights, strict=True)
        ),
    )


def _ended(tokens: TokenSequence, tokenizer: Tokenizer) -> TokenSequence:
    """The tokens with an end-of-text id after their last document."""
    eot = tokenizer.eot
    if eot is None or not len(tokens) or tokens[len(tokens) - 1 : len(tokens)][0] == eot:
        return tokens
    return JoinedTokens((tokens, np.array([eot], tokens.dtype)))
