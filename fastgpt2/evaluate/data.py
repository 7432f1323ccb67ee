"""The text that is scored: files or token shards, detokenized, tokenized, counted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastgpt2.errors import UserError
from fastgpt2.evaluate.detokenizers import DETOKENIZERS
from fastgpt2.text.corpora import VAL_FRACTION, Document, load_corpus, split_pieces
from fastgpt2.text.documents import TEXT_COLUMN
from fastgpt2.text.encoding import Tokenizer, token_bytes
from fastgpt2.text.mixture import refuse_weights
from fastgpt2.text.prepared import find_prepared, open_prepared
from fastgpt2.text.shards import TokenShards, dtype_for
from fastgpt2.text.stored import TokenSequence
from fastgpt2.text.token_files import (
    FoundFiles,
    find_token_files,
    open_token_files,
    recorded_tokenizer,
    tokenizer_of,
)

SPLITS = ("all", "train", "val")


@dataclass(frozen=True)
class Text:
    """Tokens to score; ``words`` is None if the text is unknown or was cut."""

    tokens: TokenSequence
    tokenizer: Tokenizer
    words: int | None

    def first(self, count: int | None) -> "Text":
        """The first ``count`` tokens, or all of them."""
        if count is None or count >= len(self.tokens):
            return self
        return replace(self, tokens=self.tokens[:count], words=None)

    def token_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of each id's token, (V,); 0 for the end-of-text id, which is not text."""
        return token_bytes(self.tokenizer)


@dataclass(frozen=True)
class Documents:
    """Texts in memory, detokenized; ``words`` counts words before detokenization."""

    source: str
    split: str
    detokenizer: str
    texts: tuple[str, ...]
    words: int
    tokenizer: None = None

    def tokenize(self, tokenizer: Tokenizer) -> Text:
        """The ids of ``tokenizer``, with its end-of-text id between documents.

        Raises:
            UserError: a character that the vocabulary lacks.
        """
        ids: list[int] = []
        for number, text in enumerate(self.texts):
            if number and tokenizer.eot is not None:
                ids.append(tokenizer.eot)
            ids += tokenizer.encode(text)
        return Text(np.array(ids, dtype_for(tokenizer.vocab_size)), tokenizer, self.words)


@dataclass(frozen=True)
class Shards:
    """A split of a folder of token shards that ``fastgpt2.prepare`` wrote."""

    source: str
    split: str
    tokens: TokenShards
    tokenizer: Tokenizer
    detokenizer: str = "none"

    def tokenize(self, tokenizer: Tokenizer) -> Text:
        """The tokens, which must come from this tokenizer.

        Raises:
            UserError: they come from another one.
        """
        ours = self.tokenizer
        if tokenizer.fingerprint != ours.fingerprint:
            raise UserError(
                f"{self.source}: tokens of {ours.name} {ours.fingerprint}, but the model's "
                f"tokenizer is {tokenizer.name} {tokenizer.fingerprint}"
            )
        return Text(self.tokens, tokenizer, None)


@dataclass(frozen=True)
class Ids:
    """Token files of llm.c or nanoGPT; ``tokenizer`` is the one recorded beside them, if any."""

    source: str
    split: str
    found: FoundFiles
    tokenizer: Tokenizer | None
    detokenizer: str = "none"

    def tokenize(self, tokenizer: Tokenizer) -> Text:
        """The ids, all of them checked; a recorded tokenizer must be this one.

        Raises:
            UserError: the recorded tokenizer is another one, or an id exceeds the vocabulary.
        """
        tokenizer = tokenizer_of(self.found, tokenizer)
        tokens, val = open_token_files(self.found, tokenizer.vocab_size)
        if self.split == "val" and val is not None:
            tokens = val
        elif self.split != "all" and val is None:
            border = int(len(tokens) * (1 - VAL_FRACTION))
            tokens = tokens.part(border) if self.split == "val" else tokens.part(0, border)
        tokens.check(token_bytes(tokenizer))
        return Text(tokens, tokenizer, None)


def open_data(
    data: Sequence[str],
    *,
    split: str | None = None,
    detokenizer: str = "none",
    text_column: str = TEXT_COLUMN,
) -> Documents | Shards | Ids:
    """Read what ``--data`` names.

    Args:
        data: files, folders, patterns, names of corpora, one folder of token shards, or token
            files of llm.c or nanoGPT.
        split: ``train`` or ``val``, as ``fastgpt2.train`` splits a text by default; None means
            all of a text; for tokens, the validation split if there is one.
        detokenizer: a name in ``DETOKENIZERS``, for text.
        text_column: key of a JSON line, or column of a table, that holds the text.

    Raises:
        UserError: no data, not UTF-8, or an option that does not apply to token shards.
    """
    refuse_weights(data, "evaluate")
    if folder := find_prepared(data):
        return _open_shards(folder, split, detokenizer)
    if found := find_token_files(data):
        return _open_token_files(found, split, detokenizer)
    split = split or "all"
    corpus = load_corpus(data, text_column=text_column)
    texts: list[str] = []
    for piece in split_pieces(corpus, 0.0 if split == "all" else VAL_FRACTION):
        if split not in ("all", piece.split):
            continue
        if piece.after_document or not texts:
            texts.append("")
        texts[-1] += piece.text
    if split == "all" and texts and isinstance(corpus.documents[-1], Document):
        # the perplexity of a text is that of its own tokens, without the end-of-text id after it
        texts.pop()
    chosen = DETOKENIZERS[detokenizer]
    words = sum(map(chosen.count, texts))
    return Documents(corpus.source, split, detokenizer, tuple(map(chosen.detokenize, texts)), words)


def _open_shards(folder: Path, split: str | None, detokenizer: str) -> Shards:
    if detokenizer != "none":
        raise UserError(f"--detokenizer: {folder} holds tokens, not text")
    prepared = open_prepared(folder)
    split = split or ("val" if "val" in prepared.tokens else "train")
    if split not in prepared.tokens:
        raise UserError(f"--split {split}: {folder} has {', '.join(prepared.tokens)}")
    # find damage now, not after hours
    prepared.tokens[split].verify()
    return Shards(str(folder), split, prepared.tokens[split], prepared.tokenizer)


def _open_token_files(found: FoundFiles, split: str | None, detokenizer: str) -> Ids:
    if detokenizer != "none":
        raise UserError(f"--detokenizer: {found.all[0]} holds tokens, not text")
    if split == "all" and found.val:
        raise UserError("--split all: by their names, the token files are train, val")
    split = split or ("val" if found.val else "all")
    files = {"train": found.train, "val": found.val or found.train, "all": found.all}[split]
    return Ids(", ".join(map(str, files)), split, found, recorded_tokenizer(found))
