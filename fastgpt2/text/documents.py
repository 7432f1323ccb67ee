"""Compressed text, JSON lines and Parquet tables, read as streams."""

import codecs
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from fastgpt2.errors import UserError
from fastgpt2.files import parse_json, write_text

TEXT_COLUMN = "text"
# compression by file suffix; other files are read unchanged
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
# JSON lines, under both of their names
_JSON_LINES = (".jsonl", ".ndjson")
# compressed bytes decompressed at a time: 512 bytes of repeated text may become megabytes
_COMPRESSED_BYTES = 512
# rows of a Parquet table in memory at once
_BATCH_ROWS = 256


class KnownSizes:
    """Bytes of text in files that must be read to count them: each file is counted once.

    A file is counted again if its size or time has changed. The parts of one ``prepare`` share the
    counts in a file.
    """

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._is_new = False

    def of(self, path: Path, kind: str, count: Callable[[], int]) -> int:
        """The bytes of text in a file.

        Args:
            path: the file.
            kind: which text of the file is counted.
            count: reads the file and counts; called only if the count is unknown.
        """
        stat = path.stat()
        key = f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns} {kind}"
        if key not in self._sizes:
            self._sizes[key] = count()
            self._is_new = True
        return self._sizes[key]

    def load(self, path: Path) -> None:
        """Add what another process has saved; a missing or damaged file is ignored.

        Args:
            path: the file that ``save`` wrote.
        """
        try:
            saved = parse_json(path.read_bytes())
            self._sizes |= {str(key): int(size) for key, size in saved.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return

    def save(self, path: Path) -> None:
        """Write all counts, if any of them is new.

        Args:
            path: the file, in a folder that exists; replaced atomically.
        """
        if self._is_new:
            write_text(path, json.dumps(self._sizes) + "\n")
            self._is_new = False


KNOWN_SIZES = KnownSizes()


def is_compressed(path: Path) -> bool:
    """Whether ``path`` ends in ``.gz`` or ``.zst``, in upper or lower case.

    Args:
        path: a file.
    """
    return path.suffix.lower() in _COMPRESSED


def has_records(path: Path) -> bool:
    """Whether a file has many documents: JSON lines (``.jsonl``, ``.ndjson``, also compressed), a
    table (``.parquet``).

    Args:
        path: a file.
    """
    return _is_table(path) or _inner_suffix(path) in _JSON_LINES


def read_chunks(path: Path, size: int) -> Iterator[bytes]:
    """The bytes of a file in order, decompressed according to its suffix.

    Args:
        path: the file.
        size: bytes in a chunk; the last one may have fewer.

    Raises:
        UserError: the file cannot be read, is cut off or damaged, or zstd has no library here.
    """
    kind = _COMPRESSED.get(path.suffix.lower())
    try:
        with path.open("rb") as file:
            if kind is None:
                while chunk := file.read(size):
                    yield chunk
                return
            buffer = bytearray()
            for chunk in _decompressed(file, path, kind):
                buffer += chunk
                while len(buffer) >= size:
                    yield bytes(buffer[:size])
                    del buffer[:size]
            if buffer:
                yield bytes(buffer)
    except OSError as error:
        raise UserError(f"data: cannot read {path}: {error.strerror}") from error


def whole(parts: Iterator[bytes], size: int, name: str) -> Iterator[bytes]:
    """The parts of a text, which must be as many bytes as were counted before.

    Args:
        parts: of the text, in order.
        size: bytes in all.
        name: of the file, for the error.

    Raises:
        UserError: at the end, if they were more or fewer.
    """
    read = 0
    for part in parts:
        read += len(part)
        yield part
    if read != size:
        raise UserError(
            f"data: {name} has changed while it was read: {read:,} bytes of text, not {size:,}"
        )


@dataclass(frozen=True)
class Records:
    """A file in which every line of JSON, or every row of a Parquet table, is one document.

    Args:
        path: the file.
        column: key of a JSON line, or column of a table, that holds the text.
    """

    path: Path
    column: str = TEXT_COLUMN

    @property
    def name(self) -> str:
        """The file, for error messages."""
        return str(self.path)

    @property
    def place(self) -> str:
        """The real path of the file, whatever link leads to it."""
        return os.path.realpath(self.path)

    @cached_property
    def size(self) -> int:
        """UTF-8 bytes of all texts, counted once by reading the whole file.

        Raises:
            UserError: as for ``texts``.
        """
        return KNOWN_SIZES.of(self.path, self.column, lambda: sum(map(len, self.texts())))

    def texts(self) -> Iterator[bytes]:
        """The texts in order, as UTF-8, one in memory at a time (for a table, a batch of rows).

        Raises:
            UserError: the file cannot be read, or a line or row, named by number, has no text.
        """
        rows = self._rows() if _is_table(self.path) else self._json_lines()
        for where, value in rows:
            if not isinstance(value, str):
                kind = "null" if value is None else type(value).__name__
                raise UserError(f"data: {where}: {self.column!r} must be text, got {kind}")
            try:
                # a byte-order mark is a file's, not the text's
                yield value.removeprefix("\ufeff").encode("utf-8")
            except UnicodeEncodeError:
                raise UserError(
                    f"data: {where}: {self.column!r} has a lone surrogate, which is not text"
                ) from None

    def _json_lines(self) -> Iterator[tuple[str, Any]]:
        """Each line's value in the column, with its place; blank lines are skipped."""
        for number, line in enumerate(_lines(read_chunks(self.path, 1 << 16)), start=1):
            where = f"{self.path}, line {number}"
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                byte = line[error.start]
                raise UserError(f"data: {where}: not UTF-8: byte 0x{byte:02x}") from None
            except json.JSONDecodeError as error:
                raise UserError(
                    f"data: {where}: not JSON: {error.msg} at column {error.colno}"
                ) from None
            # nested too deeply, or a number with too many digits
            except (RecursionError, ValueError) as error:
                raise UserError(f"data: {where}: not JSON that can be read: {error}") from None
            if not isinstance(value, dict):
                kind = "null" if value is None else type(value).__name__
                raise UserError(f"data: {where}: expected a JSON object, got {kind}")
            if self.column not in value:
                raise UserError(f"data: {where}: {self._no_column(value)}")
            yield where, value[self.column]

    def _rows(self) -> Iterator[tuple[str, Any]]:
        """Each row's value in the column, with its place."""
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise UserError(
                f"data: {self.path} needs pyarrow: pip install 'fastgpt2[parquet]'"
            ) from None
        number = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                names = file.schema_arrow.names
                if self.column not in names:
                    raise UserError(f"data: {self.path}: {self._no_column(names)}")
                if (count := names.count(self.column)) > 1:
                    raise UserError(
                        f"data: {self.path}: {count} columns are called {self.column!r}"
                    )
                for batch in file.iter_batches(_BATCH_ROWS, columns=[self.column]):
                    for value in batch.column(0).to_pylist():
                        number += 1
                        yield f"{self.path}, row {number}", value
        # a damaged page raises OSError without a number, invalid UTF-8 raises ValueError
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"data: {self.path}: cannot read the Parquet table after row {number}: {first}"
            ) from error

    def _no_column(self, names: Any) -> str:
        there = ", ".join(map(repr, names)) or "none"
        return f"no column {self.column!r} (--text-column); there is {there}"


def _is_table(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _inner_suffix(path: Path) -> str:
    """The suffix before that of a compression: ``.jsonl`` for ``a.jsonl.gz``."""
    return (Path(path.stem) if is_compressed(path) else path).suffix.lower()


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The lines of a text, without their ends; a line may span many chunks."""
    begun: list[bytes] = []
    for chunk in chunks:
        end, *others = chunk.split(b"\n")
        begun.append(end)
        for line in others:
            yield b"".join(begun)
            begun = [line]
    yield b"".join(begun)


def _decompressed(file: BinaryIO, path: Path, kind: str) -> Iterator[bytes]:
    """The content of all streams in a compressed file, in order."""
    start, damage = _decompressor(path, kind)
    stream: Any = None
    lines = 0
    while raw := file.read(_COMPRESSED_BYTES):
        while raw:
            if stream is None:
                # tapes and disks pad files with zeros; no stream begins with one
                raw = raw.lstrip(b"\0")
                if not raw:
                    break
                stream = start()
            try:
                chunk = stream.decompress(raw)
            except damage as error:
                raise UserError(
                    f"data: {path} is not {kind}, or damaged, after line {lines}: {error}"
                ) from None
            lines += chunk.count(b"\n")
            yield chunk
            raw = b""
            if stream.eof:
                raw, stream = stream.unused_data, None
    if stream is not None:
        raise UserError(f"data: {path} is cut off: its {kind} stream ends after line {lines}")


def _decompressor(path: Path, kind: str) -> tuple[Callable[[], Any], type[Exception]]:
    """A function that makes a decompressor for one stream, and its error for a damaged one."""
    if kind == "gzip":
        # 16 + 15: a gzip header and the largest window
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.ZstdDecompressor, zstd.ZstdError
    try:
        import zstandard
    except ImportError:
        raise UserError(f"data: {path} needs zstandard: pip install 'fastgpt2[zstd]'") from None
    return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
