"""Rung 2: byte-pair encoding, which spells every text and gives frequent pieces an id of their own.

Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016;
over bytes as in Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
``GPT2Tokenizer``, the last tokenizer of the ladder, applies GPT-2's 50,000 merges with tiktoken.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Self

import regex  # type: ignore[import-untyped]

from fastgpt2.errors import UserError
from fastgpt2.text.bpe import PATTERN, GPT2Tokenizer
from fastgpt2.text.encoding import END_OF_TEXT

__all__ = ["BytePairEncoder", "GPT2Tokenizer"]

# GPT-2 numbers the bytes that print as themselves first and spells the rest from U+0100 on,
# which is how a space became the famous Ġ
_PRINTABLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
_BYTES = [*_PRINTABLE, *(b for b in range(256) if b not in _PRINTABLE)]
_SPELLING = {b: chr(b) if i < len(_PRINTABLE) else chr(256 + i - len(_PRINTABLE))
             for i, b in enumerate(_BYTES)}  # fmt: skip


def _merge(pieces: list[bytes], ranks: Mapping[bytes, int]) -> list[bytes]:
    """Join neighbours, the pair of the lowest rank first, until no pair has one."""
    while True:
        known = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in ranks]
        if not known:
            return pieces
        i = min(known)[1]
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]


class BytePairEncoder:
    """Byte-pair encoding in plain Python, equal to tiktoken's on the same ranks.

    A text is split into words by GPT-2's pattern, a word into its bytes; then neighbours are
    joined, the earliest learned pair first.

    Args:
        ranks: token to id; the 256 bytes, then the merged tokens in the order they were learned.
    """

    def __init__(self, ranks: Mapping[bytes, int]) -> None:
        self.ranks = dict(ranks)
        self._tokens = {id_: token for token, id_ in ranks.items()}
        missing = [b for b in range(256) if bytes([b]) not in self.ranks]
        if missing:
            raise UserError(f"BytePairEncoder: no id for {len(missing)} of the 256 bytes")

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.ranks)

    @classmethod
    def train(cls, text: str, vocab_size: int) -> Self:
        """Learn merges: again and again the most frequent pair becomes a token.

        Of equally frequent pairs the first in the order of bytes is taken. Stops early when every
        word of the text is one token.

        Raises:
            UserError: vocab_size is below 256, the number of bytes.
        """
        if vocab_size < 256:
            raise UserError(f"BytePairEncoder: vocab_size must be at least 256, got {vocab_size}")
        ranks = {bytes([b]): id_ for id_, b in enumerate(_BYTES)}
        words = Counter(word.encode("utf-8") for word in regex.findall(PATTERN, text))
        spelled = {word: [bytes([b]) for b in word] for word in words}
        while len(ranks) < vocab_size:
            pairs: Counter[tuple[bytes, bytes]] = Counter()
            for word, pieces in spelled.items():
                for pair in pairwise(pieces):
                    pairs[pair] += words[word]
            if not pairs:
                break
            left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
            ranks[left + right] = len(ranks)
            for word, pieces in spelled.items():
                if left in pieces:
                    spelled[word] = _merge(pieces, ranks)
        return cls(ranks)

    def encode(self, text: str) -> list[int]:
        """Ids of the tokens of ``text``; no text is impossible to encode."""
        return [
            self.ranks[piece]
            for word in regex.findall(PATTERN, text)
            for piece in _merge([bytes([b]) for b in word.encode("utf-8")], self.ranks)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, exactly; U+FFFD where they end inside a character."""
        return b"".join(self._tokens[int(id_)] for id_ in ids).decode("utf-8", errors="replace")

    def gpt2_files(self) -> tuple[str, str]:
        """The encoder as GPT-2's two files, ``encoder.json`` and ``vocab.bpe``.

        ``GPT2Tokenizer(*encoder.gpt2_files())`` gives the same ids, and knows ``<|endoftext|>``.
        """
        spelled = {"".join(_SPELLING[b] for b in token): id_ for token, id_ in self.ranks.items()}
        merges = []
        for token, id_ in self.ranks.items():
            if len(token) > 1:
                # the two tokens this one was joined from: what the earlier merges leave
                earlier = {t: r for t, r in self.ranks.items() if r < id_}
                parts = _merge([bytes([b]) for b in token], earlier)
                merges.append(" ".join("".join(_SPELLING[b] for b in part) for part in parts))
        encoder = json.dumps(spelled | {END_OF_TEXT: len(spelled)})
        return encoder, "\n".join(["#version: 0.2", *merges, ""])
