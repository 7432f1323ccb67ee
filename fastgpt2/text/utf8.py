"""Decode the bytes of a file: strict UTF-8 that never takes binary data for text."""

import codecs

from fastgpt2.errors import UserError

# first bytes of files that people mistake for text, and their kind
_MAGIC = (
    # llm.c's token files: magic number 20240520, little-endian (karpathy/llm.c, dev/data)
    ((20240520).to_bytes(4, "little"), "a token file of llm.c, whose name must end in .bin"),
    (codecs.BOM_UTF32_LE, "text in UTF-32"),
    (codecs.BOM_UTF32_BE, "text in UTF-32"),
    (codecs.BOM_UTF16_LE, "text in UTF-16"),
    (codecs.BOM_UTF16_BE, "text in UTF-16"),
    (b"\x1f\x8b", "compressed by gzip"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (b"\xfd7zXZ\0", "compressed by xz"),
    (b"BZh", "compressed by bzip2"),
    (b"PK\x03\x04", "a zip archive (or a PyTorch checkpoint, or an office document)"),
    (b"PAR1", "a Parquet table"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"%PDF", "a PDF document"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"\x7fELF", "a program"),
)
_HEAD_BYTES = 64


def is_utf8(text: str) -> bool:
    """Whether ``text`` can be encoded as UTF-8, which a lone surrogate cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class Utf8Decoder:
    """UTF-8 over several chunks of one file.

    A byte-order mark at the start of the file is dropped: it marks the encoding and is not part of
    the text. A NUL is refused: text has none, but UTF-16, token files and the tails of files cut
    off by a crash do.

    Args:
        name: the file, for error messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        # bytes seen so far, and the first of them
        self._read = 0
        self._head = b""

    def decode(self, chunk: bytes, final: bool = False) -> str:
        """The text of the next chunk; a character cut at its end comes with the following chunk.

        Args:
            chunk: the next bytes; the first chunk holds a whole character at least.
            final: whether the file ends here.

        Raises:
            UserError: a NUL or invalid UTF-8; the message has file, offset and the likely kind.
        """
        if len(self._head) < _HEAD_BYTES:
            self._head += chunk[: _HEAD_BYTES - len(self._head)]
        if self._read == 0 and chunk.startswith(codecs.BOM_UTF8):
            self._read = len(codecs.BOM_UTF8)
            chunk = chunk[self._read :]
        pending = len(self._decoder.getstate()[0])
        nul = chunk.find(0)
        try:
            text = self._decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            offset = self._read - pending + error.start
            # whichever comes first in the file
            if not 0 <= nul < error.start - pending:
                byte = error.object[error.start]
                raise UserError(
                    f"data: {self._name} is not UTF-8: byte 0x{byte:02x} at offset {offset} "
                    f"({error.reason}){self._looks_like()}"
                ) from None
        if nul >= 0:
            raise UserError(
                f"data: {self._name} is not text: NUL byte at offset {self._read + nul}"
                f"{self._looks_like()}"
            )
        self._read += len(chunk)
        return text

    def _looks_like(self) -> str:
        kind = _kind(self._head)
        return f"; it looks like {kind}" if kind else ""


def kind_of_bytes(head: bytes) -> str | None:
    """The kind of a file that begins with ``head``, or None if its first bytes do not tell.

    Args:
        head: the first bytes of a file.
    """
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)


def looks_like_text(head: bytes) -> bool:
    """Whether ``head`` is UTF-8 without control characters; its last character may be cut off.

    Args:
        head: the first bytes of a file.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(char.isprintable() or char.isspace() for char in text)


def _kind(head: bytes) -> str | None:
    """The likely kind of a file that is not UTF-8 text, from its first bytes."""
    if kind := kind_of_bytes(head):
        return kind
    nuls = [i % 2 for i, byte in enumerate(head) if byte == 0]
    # a single one may be anywhere
    if len(nuls) > 1 and len(set(nuls)) == 1:
        return "text in UTF-16; `iconv -f UTF-16LE -t UTF-8` (or UTF-16BE) converts it"
    if b"\0" not in head:
        return None
    return "binary data"
