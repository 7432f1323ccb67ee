"""Where training text comes from: files, folders, patterns, and a few corpora known by name."""

import codecs
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal

from fastgpt2.download import DownloadError, cache_dir, download
from fastgpt2.errors import UserError
from fastgpt2.text.documents import (
    KNOWN_SIZES,
    TEXT_COLUMN,
    Records,
    has_records,
    is_compressed,
    read_chunks,
    whole,
)
from fastgpt2.text.matches import files_below, matching_files
from fastgpt2.text.own_files import without_runs
from fastgpt2.text.pipes import read_once
from fastgpt2.text.utf8 import Utf8Decoder

# share of the text kept for validation, as in nanoGPT
VAL_FRACTION = 0.1
PYTHON_DOCS = "python-docs"
# bytes of text per piece: the tokenizer holds one piece in memory at a time
PIECE_BYTES = 1 << 20


Split = Literal["train", "val"]


@dataclass(frozen=True)
class RemoteText:
    """A text on the network: where it lives, and what its bytes must be."""

    file: str
    urls: tuple[str, ...]
    sha256: str
    size: int


REMOTE = {
    # Edith Wharton, 1908, public domain; the text that "Build a Large Language Model" trains on
    "the-verdict": RemoteText(
        "the-verdict.txt",
        (
            "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/"
            "01_main-chapter-code/the-verdict.txt",
        ),
        "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
        20_479,
    ),
    # 40,000 lines of Shakespeare, collected by Karpathy for char-rnn
    "tinyshakespeare": RemoteText(
        "tinyshakespeare.txt",
        (
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
            "input.txt",
        ),
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        1_115_394,
    ),
}
CORPUS_NAMES = (PYTHON_DOCS, *REMOTE)


@dataclass(frozen=True)
class Document:
    """One text: a UTF-8 file, compressed or not, or bytes already in memory."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Bytes of text; for a compressed file, after decompression."""
        if isinstance(self.content, bytes):
            return len(self.content)
        if is_compressed(self.content):
            return KNOWN_SIZES.of(
                self.content, "text", lambda: sum(map(len, self.chunks(PIECE_BYTES)))
            )
        return self.content.stat().st_size

    @property
    def place(self) -> str:
        """What tells it from others: of a file its real path, whatever link leads to it."""
        return self.name if isinstance(self.content, bytes) else os.path.realpath(self.content)

    def chunks(self, size: int) -> Iterator[bytes]:
        """The bytes in order, at most ``size`` at a time."""
        if isinstance(self.content, bytes):
            yield from (self.content[i : i + size] for i in range(0, len(self.content), size))
        else:
            yield from read_chunks(self.content, size)


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and a name for all of them."""

    source: str
    documents: tuple[Document | Records, ...]

    @property
    def size(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(document.size for document in self.documents)

    def pieces(self) -> Iterator[str]:
        """All text, in pieces of about ``PIECE_BYTES``."""
        return (piece.text for piece in split_pieces(self, 0.0))


@dataclass(frozen=True)
class Piece:
    """A stretch of one document in one split.

    ``after_document`` is true if the piece begins a document and the split already has one: an
    end-of-text id goes before it. Every document ends with that id: a split whose last document
    ends in it ends with such a piece without text. ``start`` is the piece's place in the corpus,
    ``size`` its length, in bytes.
    """

    split: Split
    text: str
    after_document: bool
    start: int
    size: int


def load_corpus(
    data: str | Sequence[str],
    *,
    text_column: str = TEXT_COLUMN,
    notify: Callable[[str], None] | None = None,
) -> Corpus:
    """The documents that ``data`` names: corpus names, files, folders, glob patterns.

    Folders are searched recursively and through symbolic links. Hidden files are skipped, and files
    are sorted by name: a folder is the same corpus as the pattern ``folder/**/*``. Files of
    training runs are skipped, and so is a file named before: it would validate what it trains. One
    file is one document, except JSON lines (``.jsonl``, ``.ndjson``) and tables (``.parquet``),
    where each line or row is one. ``.gz`` and ``.zst`` are decompressed. Such files are read once
    here, to count the bytes of their texts. A pipe (``/dev/stdin``) is read into memory.

    Args:
        data: one of these, or several.
        text_column: key of a JSON line, or column of a table, that holds the text.
        notify: called with a line if files were named more than once.

    Raises:
        UserError: something is missing, is empty or cannot be downloaded, or a line or row has no
            text.
    """
    items = [data] if isinstance(data, str) else list(data)
    if not items:
        raise UserError("data: nothing given")
    documents: dict[str, Document | Records] = {}
    repeated = []
    for item in items:
        found = _resolve(item, text_column)
        if not any(document.size for document in found):
            raise UserError(f"data: {item} is empty")
        for document in found:
            if document.size and document.place in documents:
                repeated.append(document.name)
            elif document.size:
                documents[document.place] = document
    if repeated and notify is not None:
        others = f" and {len(repeated) - 1} more" if len(repeated) > 1 else ""
        notify(f"data: named more than once, read once: {repeated[0]}{others}")
    return Corpus(", ".join(items), tuple(documents.values()))


def absolute(item: str) -> str:
    """``item`` as an absolute path or pattern, which any working directory can read.

    Args:
        item: what ``load_corpus`` takes; the name of a corpus is returned unchanged.
    """
    return item if item in CORPUS_NAMES else str(Path(item).absolute())


def _resolve(item: str, text_column: str) -> Sequence[Document | Records]:
    if item == PYTHON_DOCS:
        return python_docs()
    if item in REMOTE:
        return [Document(item, _fetch(item, REMOTE[item]))]
    path = Path(item)
    if path.is_dir():
        files = files_below(path)
    elif path.is_file():
        files = [path]
    elif path.exists():
        return [Document(item, read_once(item))]
    else:
        files = matching_files(item)
        if not files:
            raise _not_there(item)
    if not path.is_file():
        # a file given by name is always taken
        files = without_runs(files)
    if not files:
        raise UserError(f"data: {item} has no files (those of runs are left out)")
    return [Records(p, text_column) if has_records(p) else Document(str(p), p) for p in files]


def corpus_paths(item: str) -> list[Path]:
    """The files and folders that ``item`` needs; none for a corpus known by name.

    Args:
        item: what ``load_corpus`` takes.
    """
    if item in CORPUS_NAMES:
        return []
    path = Path(item)
    if path.is_dir():
        return [path, *without_runs(files_below(path))]
    return [path] if path.exists() else without_runs(matching_files(item))


def _not_there(item: str) -> UserError:
    near = get_close_matches(item, CORPUS_NAMES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(CORPUS_NAMES)}"
    return UserError(f"data: no file, folder, pattern or corpus {item!r}; {hint}")


def _fetch(name: str, text: RemoteText) -> Path:
    path = cache_dir() / "corpora" / text.file
    try:
        return download(text.urls, path, sha256=text.sha256, size=text.size)
    except DownloadError as error:
        raise UserError(
            f"data: {name} could not be downloaded ({error}); give a text file instead: --data FILE"
        ) from error


def python_docs() -> list[Document]:
    """The help texts that come with CPython (``help()``): one document per topic.

    Many topics repeat paragraphs of others (a fifth of the text in CPython 3.11). Only the first
    copy of a paragraph is kept, so that the validation split does not repeat the training text.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            f"data: this Python has no pydoc_data, so no {PYTHON_DOCS}; "
            "give a text file: --data FILE"
        ) from error
    seen: set[str] = set()
    documents = []
    for name, text in topics.items():
        # a dict drops duplicates and keeps the order
        paragraphs = dict.fromkeys(p.strip("\n") for p in text.split("\n\n"))
        content = "\n\n".join(p for p in paragraphs if p and p not in seen)
        seen.update(paragraphs)
        if content:
            documents.append(Document(f"{PYTHON_DOCS}/{name}", f"{content}\n".encode()))
    return documents


def split_pieces(
    corpus: Corpus, val_fraction: float, span: tuple[int, int] | None = None
) -> Iterator[Piece]:
    """The text of ``corpus`` in order: the training text, then the validation text.

    The border comes after ``1 - val_fraction`` of the bytes, moved to the next character, even
    inside a document: for one ASCII file this is nanoGPT's split. A document's part of a split is
    cut into pieces of about ``PIECE_BYTES``, at places where no tokenizer joins characters (see
    ``cut_point``).

    Args:
        corpus: the documents.
        val_fraction: share of the bytes kept for validation.
        span: bytes [start, stop) of the corpus: only the pieces that begin there, identical to
            those of the whole corpus. Documents before and after it are not read.

    Raises:
        UserError: a file is not UTF-8 text, naming the file and the place.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction must be in [0, 1), got {val_fraction}")
    first, last = (0, corpus.size) if span is None else span
    for piece in _pieces(corpus, int(corpus.size * (1 - val_fraction)), first):
        if piece.start >= last:
            return
        if piece.start >= first:
            yield piece


def _pieces(corpus: Corpus, border: int, first: int) -> Iterator[Piece]:
    """All pieces in order, except those of documents that end before byte ``first``."""
    begun: set[Split] = set()
    # the split in which the last document ended
    ended: Split | None = None
    for text in _texts(corpus, border, first):
        if text.skipped is not None:
            begun.add(text.skipped)
            ended = text.skipped
            continue
        start = text.start
        # a document that is only a byte-order mark has no text
        chunks = (chunk for chunk in _decoded(text, border) if chunk[1])
        for split, group in groupby(chunks, key=itemgetter(0)):
            if ended is not None and start == text.start and ended != split:
                yield Piece(ended, "", True, start, 0)
            ended = split
            after_document = split in begun
            begun.add(split)
            buffer = ""
            for _, chunk in group:
                buffer += chunk
                if len(buffer) > PIECE_BYTES // 2:
                    cut = cut_point(buffer)
                    size = len(buffer[:cut].encode())
                    yield Piece(split, buffer[:cut], after_document, start, size)
                    after_document, buffer, start = False, buffer[cut:], start + size
            if buffer:
                size = len(buffer.encode())
                yield Piece(split, buffer, after_document, start, size)
                start += size
    if ended is not None:
        yield Piece(ended, "", True, corpus.size - 1, 0)


@dataclass(frozen=True)
class _Text:
    """One document, or one record of a file: its place in the corpus, its bytes.

    If ``skipped`` names a split, this is a whole file that is not read.
    """

    start: int
    chunks: Iterator[bytes]
    decoder: codecs.IncrementalDecoder | Utf8Decoder
    skipped: Split | None = None


def _texts(corpus: Corpus, border: int, first: int) -> Iterator[_Text]:
    utf8 = codecs.getincrementaldecoder("utf-8")
    start = 0
    for document in corpus.documents:
        end = start + document.size
        # a file that may be only a byte-order mark is read: it has no text
        if end <= first and not start < border < end and document.size > len(codecs.BOM_UTF8):
            split: Split = "train" if end <= border else "val"
            yield _Text(start, iter(()), utf8(), split)
        elif isinstance(document, Document):
            chunks = whole(document.chunks(PIECE_BYTES), end - start, document.name)
            yield _Text(start, chunks, Utf8Decoder(document.name))
        else:
            at = start
            for text in whole(document.texts(), end - start, document.name):
                chunks = Document(document.name, text).chunks(PIECE_BYTES)
                yield _Text(at, chunks, utf8())
                at += len(text)
        start = end


def _decoded(text: _Text, border: int) -> Iterator[tuple[Split, str]]:
    """A text as (split, its next characters), a chunk at a time."""
    left = border - text.start
    training = left > 0
    for chunk in text.chunks:
        cut = max(0, min(left, len(chunk))) if training else 0
        # a character across the border belongs to the training text
        while training and cut < len(chunk) and chunk[cut] & 0xC0 == 0x80:
            cut += 1
        left -= cut
        if cut > 0:
            yield "train", text.decoder.decode(chunk[:cut])
        if cut < len(chunk):
            training = False
            yield "val", text.decoder.decode(chunk[cut:])
    text.decoder.decode(b"", final=True)


def cut_point(text: str) -> int:
    """Where ``text`` can be cut so that its two parts tokenize as the whole does.

    No word of GPT-2's pattern has a space after a non-space, so the text can be cut before any
    newline or space that follows a non-space. The last such newline is taken, else the last such
    space, else the end of the text.
    """
    for space in "\n ":
        place = text.rfind(space)
        while place > 0:
            if not text[place - 1].isspace():
                return place
            place = text.rfind(space, 0, place)
    return len(text)
