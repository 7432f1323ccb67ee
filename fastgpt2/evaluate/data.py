"""The text that is scored: files or token shards, detokenized, tokenized, counted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastgpt2.errors import UserError
from fastgpt2.evaluate.detokenizers import DETOKENIZERS
from fastgpt2.text.corpora import VAL_FRACTION, load_corpus, split_pieces
from fastgpt2.text.documents import TEXT_COLUMN
from fastgpt2.text.encoding import Tokenizer
from fastgpt2.text.loaders import TokenSequence
from fastgpt2.text.prepared import find_prepared, open_prepared
from fastgpt2.text.shards import TokenShards, dtype_for

SPLITS = ("all", "train", "val")


@dataclass(frozen=True)
class Text:
    """Tokens to score; ``words`` is None where the text is not at hand, or not all of it."""

    tokens: TokenSequence
    tokenizer: Tokenizer
    words: int | None

    def first(self, count: int | None) -> "Text":
        """The first ``count`` tokens, or all of them."""
        if count is None or count >= len(self.tokens):
            return self
        return replace(self, tokens=self.tokens[:count], words=None)

    def token_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of each id's token, (V,); 0 for the end-of-text id, which is no text."""
        tokenizer = self.tokenizer
        lengths = [len(tokenizer.decode_bytes([id_])) for id_ in range(tokenizer.vocab_size)]
        if tokenizer.eot is not None:
            lengths[tokenizer.eot] = 0
        return np.array(lengths, np.int64)


@dataclass(frozen=True)
class Documents:
    """Texts in memory, detokenized; ``words`` counts them as they were before."""

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
    """A split of a folder that ``fastgpt2.prepare`` wrote."""

    source: str
    split: str
    tokens: TokenShards
    tokenizer: Tokenizer
    detokenizer: str = "none"

    def tokenize(self, tokenizer: Tokenizer) -> Text:
        """The tokens, which must be of this tokenizer.

        Raises:
            UserError: they are of another one.
        """
        ours = self.tokenizer
        if tokenizer.fingerprint != ours.fingerprint:
            raise UserError(
                f"{self.source}: tokens of {ours.name} {ours.fingerprint}, but the model's "
                f"tokenizer is {tokenizer.name} {tokenizer.fingerprint}"
            )
        return Text(self.tokens, tokenizer, None)


def open_data(
    data: Sequence[str],
    *,
    split: str | None = None,
    detokenizer: str = "none",
    text_column: str = TEXT_COLUMN,
) -> Documents | Shards:
    """Read what ``--data`` names.

    Args:
        data: files, folders, patterns, names of corpora, or one folder of token shards.
        split: ``train`` or ``val``, as ``fastgpt2.train`` splits a text by default; None is all of
            a text, and of shards the validation tokens where there are some.
        detokenizer: a name in ``DETOKENIZERS``, for text.
        text_column: where a line of JSON or a table has its text.

    Raises:
        UserError: nothing there, not UTF-8, or an option that token shards cannot serve.
    """
    if folder := find_prepared(data):
        return _open_shards(folder, split, detokenizer)
    split = split or "all"
    corpus = load_corpus(data, text_column=text_column)
    texts: list[str] = []
    for piece in split_pieces(corpus, 0.0 if split == "all" else VAL_FRACTION):
        if split not in ("all", piece.split):
            continue
        if piece.after_document or not texts:
            texts.append("")
        texts[-1] += piece.text
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
    # damage should show now, not after hours
    prepared.tokens[split].verify()
    return Shards(str(folder), split, prepared.tokens[split], prepared.tokenizer)
