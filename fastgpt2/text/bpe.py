"""GPT-2's byte-level BPE: where its vocabulary comes from, and tiktoken doing the work."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import tiktoken

from fastgpt2.download import DownloadError, cache_dir, download
from fastgpt2.errors import UserError
from fastgpt2.files import naming, parse_json, write_text
from fastgpt2.text.encoding import END_OF_TEXT, fingerprint, well_formed

# GPT-2's split into words (openai/gpt-2, src/encoder.py). Quantifiers are possessive where the
# matches stay the same, so that long runs need no backtracking
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

ENCODER, MERGES = "encoder.json", "vocab.bpe"
# OpenAI's names, then those of Hugging Face, for the same two files
FILE_NAMES = ((ENCODER, MERGES), ("vocab.json", "merges.txt"))
_OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_HUGGING_FACE = "https://huggingface.co/openai-community/gpt2/resolve/main/"
# sha256 as in tiktoken_ext/openai_public.py
SHA256 = {
    ENCODER: "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    MERGES: "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
MIRRORS = {
    ENCODER: (_OPENAI + ENCODER, _HUGGING_FACE + "vocab.json"),
    MERGES: (_OPENAI + MERGES, _HUGGING_FACE + "merges.txt"),
}


class VocabularyMissingError(UserError):
    """The GPT-2 vocabulary is not on this disk and could not be downloaded."""


class GPT2Tokenizer:
    """GPT-2's tokenizer, built from the text of its two vocabulary files.

    Args:
        encoder: content of ``encoder.json``: token, in GPT-2's printable spelling, to id.
        merges: content of ``vocab.bpe``: one merge per line, the most frequent first.
        origin: where they came from, for error messages.

    Raises:
        UserError: the files are damaged, do not belong together, or lack some of the 256 bytes.
    """

    name = "gpt2"

    def __init__(self, encoder: str, merges: str, *, origin: str = "vocabulary") -> None:
        self._files = {ENCODER: encoder, MERGES: merges}
        ranks, special = _parse(encoder, merges, origin)
        self._encoding = tiktoken.Encoding(
            self.name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        by_id = {id_: token for token, id_ in ranks.items()}
        by_id |= {id_: token.encode("utf-8") for token, id_ in special.items()}
        self.vocab_size = len(by_id)
        self._tokens = [by_id[id_] for id_ in range(self.vocab_size)]
        self.eot = special.get(END_OF_TEXT)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the vocabulary, whichever files it was read from."""
        return fingerprint(self._tokens)

    def encode(
        self,
        text: str,
        *,
        allow_special: bool = False,
        allowed_special: AbstractSet[str] | Literal["all"] = frozenset(),
    ) -> list[int]:
        """Ids of ``text``; ``<|endoftext|>`` in it is plain text unless it is allowed.

        Args:
            text: what is encoded.
            allow_special: whether special tokens become single ids; all tokenizers here have this.
            allowed_special: the same under tiktoken's name: a set of special tokens, or ``"all"``.

        Raises:
            UserError: ``allowed_special`` has a token that the vocabulary lacks.
        """
        allowed = "all" if allow_special else allowed_special
        if unknown := set() if allowed == "all" else allowed - self._encoding.special_tokens_set:
            raise UserError(f"tokenizer gpt2: no special token {min(unknown)!r}")
        if allowed:
            return self._encoding.encode(
                well_formed(text), allowed_special=allowed, disallowed_special=()
            )
        return self._encoding.encode_ordinary(well_formed(text))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids``; a prefix of a text may end inside a character."""
        parts = []
        for id_ in ids:
            if not 0 <= id_ < self.vocab_size:
                raise UserError(f"tokenizer gpt2: id {id_} is not in [0, {self.vocab_size})")
            parts.append(self._tokens[id_])
        return b"".join(parts)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, with U+FFFD where the bytes are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save_vocabulary(self, folder: Path) -> None:
        """Write ``encoder.json`` and ``vocab.bpe`` into ``folder``, as GPT-2 programs read."""
        for name, text in self._files.items():
            write_text(folder / name, text)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Read ``encoder.json`` + ``vocab.bpe``, or ``vocab.json`` + ``merges.txt``, or
        ``tokenizer.json``, the one file that newer Hugging Face models have."""
        folder = Path(folder)
        for encoder, merges in FILE_NAMES:
            if (folder / encoder).is_file() and (folder / merges).is_file():
                texts = (_read(folder / encoder), _read(folder / merges))
                return cls(*texts, origin=f"{folder / encoder} and {merges}")
        if (folder / "tokenizer.json").is_file():
            origin = folder / "tokenizer.json"
            return cls(*_split_tokenizer_json(_read(origin), origin), origin=str(origin))
        raise UserError(
            f"vocabulary folder {folder}: needs {ENCODER} and {MERGES} (or vocab.json and "
            f"merges.txt, or tokenizer.json)"
        )

    @classmethod
    def load(
        cls, vocab_dir: str | Path | None = None, *, timeout: float = 15.0, retries: int = 1
    ) -> Self:
        """The vocabulary in ``vocab_dir`` if given, else tiktoken's cache, else the network.

        Raises:
            VocabularyMissingError: none of the three has it.
            UserError: ``vocab_dir`` was given and its files cannot be used.
        """
        if vocab_dir is not None:
            return cls.from_folder(vocab_dir)
        texts = _from_tiktoken_cache() or _from_network(timeout, retries)
        return cls(*texts, origin="GPT-2 vocabulary")


def _from_tiktoken_cache() -> tuple[str, str] | None:
    # tiktoken's own rule (tiktoken/load.py); not called, because its download has no time limit
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder is None:
        try:
            folder = os.path.join(tempfile.gettempdir(), "data-gym-cache")
        except FileNotFoundError:
            # no folder for temporary files can be written
            return None
    texts = []
    for name, expected in SHA256.items():
        path = Path(folder) / hashlib.sha1((_OPENAI + name).encode("utf-8")).hexdigest()
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != expected:
            return None
        texts.append(data.decode("utf-8"))
    return texts[0], texts[1]


def _from_network(timeout: float, retries: int) -> tuple[str, str]:
    folder = cache_dir() / "gpt2"
    try:
        paths = [
            download(
                MIRRORS[name], folder / name, sha256=SHA256[name], timeout=timeout, retries=retries
            )
            for name in (ENCODER, MERGES)
        ]
    except DownloadError as error:
        raise VocabularyMissingError(
            f"no GPT-2 vocabulary: give a folder with {ENCODER} and {MERGES} (--vocab-dir), or "
            f"fill tiktoken's cache (TIKTOKEN_CACHE_DIR), or connect to the network ({error})"
        ) from error
    return _read(paths[0]), _read(paths[1])


def _read(path: Path) -> str:
    try:
        # an editor may have added a byte-order mark
        with naming(path):
            return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from error


def _split_tokenizer_json(text: str, origin: Path) -> tuple[str, str]:
    content = _parse_json(text, str(origin))
    model = content.get("model") or {}
    if "merges" not in model or not isinstance(model.get("vocab"), dict):
        raise UserError(f"{origin}: not a BPE tokenizer (no model.vocab and model.merges)")
    vocab = model["vocab"] | {t["content"]: t["id"] for t in content.get("added_tokens", [])}
    # each merge is "a b" in older files and ["a", "b"] in newer ones
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return json.dumps(vocab), "\n".join(["#version: 0.2", *merges, ""])


def _parse_json(text: str, origin: str) -> dict[str, Any]:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise UserError(f"{origin}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{origin}: expected a JSON object, got {type(content).__name__}")
    return content


def _byte_spelling() -> dict[str, int]:
    """GPT-2 spells each byte as one printable character: map from character to byte."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    spelling = {chr(b): b for b in printable}
    return spelling | {chr(256 + i): b for i, b in enumerate(others)}


def _parse(encoder: str, merges: str, origin: str) -> tuple[dict[bytes, int], dict[str, int]]:
    """Mergeable tokens (bytes to id) and special tokens (text to id) of the two files.

    tiktoken first joins the pair whose product has the lowest id. The products' ids must therefore
    increase in the order of the merges, as in GPT-2's files and files trained the same way.
    """
    vocab = _parse_json(encoder, origin)
    if any(not isinstance(id_, int) for id_ in vocab.values()) or sorted(vocab.values()) != list(
        range(len(vocab))
    ):
        raise UserError(f"{origin}: the {len(vocab)} ids are not 0 to {len(vocab) - 1}, each once")
    spelling = _byte_spelling()
    lines = merges.splitlines()
    first_merge = 1 if lines and lines[0].startswith("#version") else 0
    products = [line.replace(" ", "", 1) for line in lines[first_merge:] if line]
    ranks: dict[bytes, int] = {}
    last = -1
    for token in [*spelling, *products]:
        id_ = vocab.get(token)
        if id_ is None or any(char not in spelling for char in token):
            raise UserError(f"{origin}: {token!r} has no id: the two files do not belong together")
        if token in spelling:
            ranks[bytes([spelling[token]])] = id_
            continue
        if id_ <= last:
            raise UserError(f"{origin}: the id {id_} of {token!r} breaks the order of the merges")
        last = id_
        ranks[bytes(spelling[char] for char in token)] = id_
    known = {*spelling, *products}
    special = {token: id_ for token, id_ in vocab.items() if token not in known}
    return ranks, special
