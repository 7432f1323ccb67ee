"""What the tokenizers share: the protocol, the end-of-text mark, the fingerprint."""

import hashlib
import inspect
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def name(self) -> str:
        """``gpt2``, ``bytes`` or ``char``; ``ids`` if the tokenizer is unknown."""

    @property
    def vocab_size(self) -> int:
        """V: every id is in [0, V)."""

    @property
    def eot(self) -> int | None:
        """Id that separates documents; None if the vocabulary has none."""

    @property
    def fingerprint(self) -> str:
        """Short sha256 of the vocabulary: equal fingerprints mean equal ids."""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of ``text``; ``<|endoftext|>`` in it is plain text unless ``allow_special``."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of ``ids``; a prefix of a text may end inside a character."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, with U+FFFD where the bytes are not UTF-8."""


def encode_special(tokenizer: Any, text: str) -> list[int]:
    """Ids of ``text``, where ``<|endoftext|>`` is one token, as in Raschka's book.

    Args:
        tokenizer: one of this package, tiktoken's, or any other with ``encode(text)``, which
            decides itself what ``<|endoftext|>`` is.
        text: what is encoded.
    """
    options = inspect.signature(tokenizer.encode).parameters
    if "allow_special" in options:
        ids = tokenizer.encode(text, allow_special=True)
    elif "allowed_special" in options:
        ids = tokenizer.encode(text, allowed_special={END_OF_TEXT})
    else:
        ids = tokenizer.encode(text)
    return list(ids)


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """UTF-8 bytes of each id's token, (V,); 0 for the end-of-text id, which is not text.

    All are 0 if the ids have no text.

    Args:
        tokenizer: whose ids.
    """
    if tokenizer.name == "ids":
        return np.zeros(tokenizer.vocab_size, np.int64)
    lengths = [len(tokenizer.decode_bytes([id_])) for id_ in range(tokenizer.vocab_size)]
    if tokenizer.eot is not None:
        lengths[tokenizer.eot] = 0
    return np.array(lengths, np.int64)


def fingerprint(tokens: Iterable[bytes]) -> str:
    """16 hex digits of the sha256 over the tokens, in order of their ids, each with its length."""
    digest = hashlib.sha256()
    for token in tokens:
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()[:16]


def well_formed(text: str) -> str:
    """``text`` with lone surrogates, which UTF-8 cannot encode, replaced by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
