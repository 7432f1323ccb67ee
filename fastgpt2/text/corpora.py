"""Where training text comes from: files, folders, patterns, and a few corpora known by name."""

import codecs
import os
from collections.abc import Iterator, Sequence
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
from fastgpt2.text.utf8 import Utf8Decoder

# part of the text that is kept for validation, as in nanoGPT
VAL_FRACTION = 0.1
PYTHON_DOCS = "python-docs"
# bytes of text in one piece: what the tokenizer sees, and holds in memory, at once
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
    # 40,000 lines of Shakespeare, as Karpathy put them together for char-rnn
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
    """One text: a UTF-8 file, compressed or not, or a string that is in memory already."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Length in bytes, of a compressed file those of its text."""
        if isinstance(self.content, bytes):
            return len(self.content)
        if is_compressed(self.content):
            return self._decompressed_size(self.content)
        return self.content.stat().st_size

    def _decompressed_size(self, path: Path) -> int:
        return KNOWN_SIZES.of(path, "text", lambda: sum(map(len, self.chunks(PIECE_BYTES))))

    def chunks(self, size: int) -> Iterator[bytes]:
        """The bytes in order, at most ``size`` at a time."""
        if isinstance(self.content, bytes):
            yield from (self.content[i : i + size] for i in range(0, len(self.content), size))
        else:
            yield from read_chunks(self.content, size)


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and what to call them together."""

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

    ``after_document`` is true where it begins a document and the split has one before it: the
    place of an end-of-text id. A split whose last document is a record (a line of JSON, a row of a
    table) ends with such a piece without text: every record ends with an end-of-text id. ``start``
    is its place in the corpus, in bytes, and ``size`` its length.
    """

    split: Split
    text: str
    after_document: bool
    start: int
    size: int


def load_corpus(data: str | Sequence[str], *, text_column: str = TEXT_COLUMN) -> Corpus:
    """The documents that ``data`` names: corpus names, files, folders, glob patterns.

    Folders are searched to the bottom, through symbolic links; hidden files are left out, and files
    come in the order of their names: a folder is the same corpus as the pattern ``folder/**/*``.
    What training runs have written is left out. One file is one document, but for JSON lines
    (``.jsonl``) and tables (``.parquet``), where each line or row is one. ``.gz`` and ``.zst`` are
    decompressed. Such files are read once here, to count the bytes of their texts. A pipe
    (``/dev/stdin``, process substitution) is read into memory.

    Args:
        data: one of these, or several.
        text_column: where a line of JSON or a table has its text.

    Raises:
        UserError: something is not there, is empty, cannot be downloaded, or holds no text where a
            line or row should have it.
    """
    items = [data] if isinstance(data, str) else list(data)
    if not items:
        raise UserError("data: nothing given")
    documents: list[Document | Records] = []
    for item in items:
        found = _resolve(item, text_column)
        if not any(document.size for document in found):
            raise UserError(f"data: {item} is empty")
        documents += [document for document in found if document.size]
    return Corpus(", ".join(items), tuple(documents))


def absolute(item: str) -> str:
    """``item`` as it can be read from any folder: a path or a pattern from the root on.

    Args:
        item: what ``load_corpus`` takes; the name of a corpus stays as it is.
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
        return [_read_once(item)]
    else:
        files = matching_files(item)
        if not files:
            raise _not_there(item)
    if not path.is_file():
        # a file that is named is taken as it is
        files = without_runs(files)
    if not files:
        raise UserError(f"data: {item} has no files (those of runs are left out)")
    return [Records(p, text_column) if has_records(p) else Document(str(p), p) for p in files]


def corpus_paths(item: str) -> list[Path]:
    """The files and folders that ``item`` needs; those of a corpus known by name are not listed.

    Args:
        item: what ``load_corpus`` takes.
    """
    if item in CORPUS_NAMES:
        return []
    path = Path(item)
    if path.is_dir():
        return [path, *files_below(path)]
    return [path] if path.exists() else list(matching_files(item))


def _read_once(item: str) -> Document:
    """A pipe, a terminal: process substitution, /dev/stdin. It can be read only once, so now.

    Raises:
        UserError: it cannot be read, or is a device that never ends.
    """
    path = Path(item)
    try:
        with path.open("rb") as file:
            if path.is_fifo() or file.isatty() or os.path.samefile(item, os.devnull):
                return Document(item, file.read())
            raise UserError(f"data: {item} is a device, not a text")
    except OSError as error:
        raise UserError(f"data: cannot read {item}: {error.strerror}") from None


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
    """The prose that CPython carries for ``help()``: one document for each topic.

    Many topics repeat paragraphs of others (a fifth of the text in CPython 3.11). Each paragraph is
    kept where it comes first, so that the validation split is not a copy of the training text.
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
        # a dict keeps the order, and one of each
        paragraphs = dict.fromkeys(p.strip("\n") for p in text.split("\n\n"))
        content = "\n\n".join(p for p in paragraphs if p and p not in seen)
        seen.update(paragraphs)
        if content:
            documents.append(Document(f"{PYTHON_DOCS}/{name}", f"{content}\n".encode()))
    return documents


def split_pieces(
    corpus: Corpus, val_fraction: float, span: tuple[int, int] | None = None
) -> Iterator[Piece]:
    """The text of ``corpus`` in order: first what trains, then what validates.

    The border is where ``1 - val_fraction`` of the bytes are passed, moved to the next character,
    be it inside a document: for one ASCII file this is nanoGPT's split. What a document has in a
    split is cut further into pieces of about ``PIECE_BYTES``, where no tokenizer would have joined
    anything (see ``cut_point``).

    Args:
        corpus: the documents.
        val_fraction: share of the bytes that validates.
        span: bytes [start, stop) of the corpus: only the pieces that begin in it, exactly as they
            are in the whole. Documents before it are not read, those after it neither.

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
    """All pieces in order, but for those of documents that end before the byte ``first``."""
    begun: set[Split] = set()
    # the split that a record, if it was the last text, ended in
    record: Split | None = None
    for text in _texts(corpus, border, first):
        if text.skipped is not None:
            begun.add(text.skipped)
            record = text.skipped if text.is_record else None
            continue
        start = text.start
        # a document of a byte-order mark alone has no text
        chunks = (chunk for chunk in _decoded(text, border) if chunk[1])
        for split, group in groupby(chunks, key=itemgetter(0)):
            if record is not None and start == text.start and record != split:
                yield Piece(record, "", True, start, 0)
            record = split if text.is_record else None
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
    if record is not None:
        yield Piece(record, "", True, corpus.size - 1, 0)


@dataclass(frozen=True)
class _Text:
    """One document, or one record of a file: its place in the corpus, its bytes.

    Where ``skipped`` names a split, it stands for a whole file that is not read.
    """

    start: int
    chunks: Iterator[bytes]
    decoder: codecs.IncrementalDecoder | Utf8Decoder
    is_record: bool
    skipped: Split | None = None


def _texts(corpus: Corpus, border: int, first: int) -> Iterator[_Text]:
    utf8 = codecs.getincrementaldecoder("utf-8")
    start = 0
    for document in corpus.documents:
        end = start + document.size
        is_record = not isinstance(document, Document)
        # a file that may be a byte-order mark alone is looked at: it has no text
        if end <= first and not start < border < end and document.size > len(codecs.BOM_UTF8):
            split: Split = "train" if end <= border else "val"
            yield _Text(start, iter(()), utf8(), is_record, split)
        elif isinstance(document, Document):
            chunks = whole(document.chunks(PIECE_BYTES), end - start, document.name)
            yield _Text(start, chunks, Utf8Decoder(document.name), is_record)
        else:
            at = start
            for text in whole(document.texts(), end - start, document.name):
                chunks = Document(document.name, text).chunks(PIECE_BYTES)
                yield _Text(at, chunks, utf8(), is_record)
                at += len(text)
        start = end


def _decoded(text: _Text, border: int) -> Iterator[tuple[Split, str]]:
    """A text as (split, its next characters), a chunk at a time."""
    left = border - text.start
    training = left > 0
    for chunk in text.chunks:
        cut = max(0, min(left, len(chunk))) if training else 0
        # the character that the border falls into goes to the training text
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

    GPT-2's pattern never has a non-space followed by a space within one word, so the border before
    a newline (failing that, a space) that follows a non-space is such a place; the last one is
    taken. A text with none is cut at its end.
    """
    for space in "\n ":
        place = text.rfind(space)
        while place > 0:
            if not text[place - 1].isspace():
                return place
            place = text.rfind(space, 0, place)
    return len(text)
