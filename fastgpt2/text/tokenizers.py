"""Bytes, characters and bare ids as tokens, and the choice between these and GPT-2's BPE."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

from fastgpt2.errors import UserError
from fastgpt2.files import naming, parse_json, write_text
from fastgpt2.text.bpe import GPT2Tokenizer, VocabularyMissingError
from fastgpt2.text.encoding import END_OF_TEXT, Tokenizer, fingerprint, well_formed

NAMES = ("gpt2", "bytes", "char", "auto")
# not tokenizer.json, which is Hugging Face's
FILE_NAME = "fastgpt2_tokenizer.json"
# seconds for each mirror when `auto` tries the network
AUTO_TIMEOUT = 3.0


class BytesTokenizer:
    """The 256 byte values, and one id that ends a text: 257 ids.

    The extra id separates documents and lets generation stop. It costs one row of the embedding.
    """

    name = "bytes"
    vocab_size = 257
    eot = 256

    @property
    def fingerprint(self) -> str:
        """The same for every instance."""
        return fingerprint([*(bytes([b]) for b in range(256)), END_OF_TEXT.encode("utf-8")])

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The UTF-8 bytes of ``text``; with ``allow_special``, 256 for each ``<|endoftext|>``."""
        parts = text.split(END_OF_TEXT) if allow_special else [text]
        ids = list(well_formed(parts[0]).encode("utf-8"))
        for part in parts[1:]:
            ids += [self.eot, *well_formed(part).encode("utf-8")]
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids``, and ``<|endoftext|>`` for 256."""
        parts = []
        for id_ in ids:
            if not 0 <= id_ < self.vocab_size:
                raise UserError(f"tokenizer bytes: id {id_} is not in [0, {self.vocab_size})")
            parts.append(END_OF_TEXT.encode("utf-8") if id_ == self.eot else bytes([int(id_)]))
        return b"".join(parts)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, with U+FFFD where the bytes are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class CharTokenizer:
    """One id for each character of a text, in order of code points, as in nanoGPT.

    There is no end-of-text id: the vocabulary has only the text's characters. A character outside
    it is an error, never silently dropped.

    Raises:
        UserError: no characters, or one of them twice.
    """

    name = "char"
    eot = None

    def __init__(self, chars: Iterable[str]) -> None:
        self.chars = tuple(chars)
        self._ids = {char: id_ for id_, char in enumerate(self.chars)}
        if not self.chars:
            raise UserError("tokenizer char: the text it is built from is empty")
        if len(self._ids) != len(self.chars) or any(len(char) != 1 for char in self.chars):
            raise UserError("tokenizer char: expected single characters, each of them once")

    @classmethod
    def from_text(cls, pieces: Iterable[str]) -> Self:
        """The tokenizer with the characters of a text: a string, or an iterable of its pieces."""
        chars: set[str] = set()
        for piece in pieces:
            chars.update(piece)
        return cls(sorted(chars))

    @property
    def vocab_size(self) -> int:
        """Number of distinct characters."""
        return len(self.chars)

    @property
    def fingerprint(self) -> str:
        """Identifies the characters and their order."""
        return fingerprint(char.encode("utf-8", "surrogatepass") for char in self.chars)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of ``text``'s characters; ``allow_special`` changes nothing: none is special."""
        try:
            return [self._ids[char] for char in text]
        except KeyError as error:
            char = error.args[0]
            raise UserError(
                f"tokenizer char: {char!r} (U+{ord(char):04X}) at position {text.index(char)} is "
                f"not among the {self.vocab_size} characters of the training text"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The characters of ``ids``."""
        chars = []
        for id_ in ids:
            if not 0 <= id_ < self.vocab_size:
                raise UserError(f"tokenizer char: id {id_} is not in [0, {self.vocab_size})")
            chars.append(self.chars[id_])
        return "".join(chars)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 of the characters of ``ids``."""
        return well_formed(self.decode(ids)).encode("utf-8")


class IdTokenizer:
    """Ids of an unknown tokenizer, written as numbers: ``" 12 7 99"``.

    There is no end-of-text id. White space alone means id 0, the line break of nanoGPT's
    ``shakespeare_char``, so that samples can begin with it.

    Args:
        vocab_size: V, the number of ids.

    Raises:
        UserError: fewer than one id.
    """

    name = "ids"
    eot = None

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 1:
            raise UserError(f"--vocab-size must be 1 or more, got {vocab_size}")
        self.vocab_size = vocab_size

    @property
    def fingerprint(self) -> str:
        """Identifies the number of ids."""
        return fingerprint([f"{self.vocab_size} ids".encode()])

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The numbers in ``text``; ``allow_special`` changes nothing: none is special."""
        words = text.split() or ["0"] * bool(text)
        for word in words:
            if not word.isdecimal() or int(word) >= self.vocab_size:
                raise UserError(
                    f"tokenizer ids: {word!r} is not a number below {self.vocab_size}; tokens of "
                    "an unknown tokenizer are written as numbers"
                )
        return [int(word) for word in words]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Each of ``ids`` as a number with a space before it."""
        return self.decode(ids).encode("ascii")

    def decode(self, ids: Iterable[int]) -> str:
        """Each of ``ids`` as a number with a space before it."""
        return "".join(f" {int(id_)}" for id_ in ids)


def get_tokenizer(
    name: str,
    *,
    vocab_dir: str | Path | None = None,
    text: Iterable[str] | None = None,
    notify: Callable[[str], None] | None = None,
) -> Tokenizer:
    """The tokenizer called ``name``: ``gpt2``, ``bytes``, ``char`` or ``auto``.

    Args:
        vocab_dir: folder with GPT-2's vocabulary files; no other place is searched.
        text: the text whose characters ``char`` uses: a string or an iterable of strings.
        notify: called with one line that says what ``auto`` chose, and why.

    Raises:
        UserError: an unknown name, or the vocabulary could not be found or downloaded.
    """
    if vocab_dir is not None and name not in ("gpt2", "auto"):
        raise UserError(f"tokenizer {name}: a vocabulary folder is for gpt2, got {vocab_dir}")
    if name == "gpt2":
        return GPT2Tokenizer.load(vocab_dir)
    if name == "bytes":
        return BytesTokenizer()
    if name == "char":
        if text is None:
            raise UserError("tokenizer char: needs the text to take its characters from")
        return CharTokenizer.from_text(text)
    if name == "auto":
        return _auto(vocab_dir, notify or (lambda line: None))
    raise UserError(f"unknown tokenizer {name!r}; known: {', '.join(NAMES)}")


def _auto(vocab_dir: str | Path | None, notify: Callable[[str], None]) -> Tokenizer:
    try:
        tokenizer = GPT2Tokenizer.load(vocab_dir, timeout=AUTO_TIMEOUT, retries=0)
    except VocabularyMissingError:
        notify(
            "tokenizer: bytes (257 ids), because GPT-2's vocabulary is neither in tiktoken's cache "
            "nor to be had from the network; --vocab-dir takes a folder with it"
        )
        return BytesTokenizer()
    notify(f"tokenizer: gpt2 ({tokenizer.vocab_size} ids)")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write what ``load_tokenizer`` needs, so that the folder works without a network.

    Always ``fastgpt2_tokenizer.json`` (name, fingerprint, vocabulary size, the characters of
    ``char``); for ``gpt2`` also its two vocabulary files, 1.5 MB, small beside a checkpoint.
    """
    folder = Path(folder)
    record: dict[str, object] = {
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
    }
    if isinstance(tokenizer, CharTokenizer):
        record["chars"] = list(tokenizer.chars)
    if isinstance(tokenizer, GPT2Tokenizer):
        tokenizer.save_vocabulary(folder)
    write_text(folder / FILE_NAME, json.dumps(record) + "\n")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that ``save_tokenizer`` wrote into ``folder``.

    Raises:
        UserError: it is missing or damaged, or its vocabulary is not the recorded one.
    """
    path = Path(folder) / FILE_NAME
    try:
        with naming(path):
            record = parse_json(path.read_bytes())
        name, expected = record["name"], record["fingerprint"]
        chars = record["chars"] if name == "char" else None
        vocab_size = int(record["vocab_size"]) if name == "ids" else None
    except FileNotFoundError:
        raise UserError(f"{folder}: no tokenizer in this folder ({FILE_NAME} is missing)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged tokenizer file: {error!r}") from error
    if chars is not None:
        tokenizer: Tokenizer = CharTokenizer(chars)
    elif vocab_size is not None:
        tokenizer = IdTokenizer(vocab_size)
    else:
        tokenizer = get_tokenizer(name, vocab_dir=folder if name == "gpt2" else None)
    if tokenizer.fingerprint != expected:
        raise UserError(
            f"{path}: expected fingerprint {expected}, the vocabulary has {tokenizer.fingerprint}"
        )
    return tokenizer
