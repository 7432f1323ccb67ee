"""Token shards: a corpus as ids on the disk, read piece by piece in bounded memory.

A shard is a 256-byte header and the ids, little-endian. The header describes the ids completely, so
that they cannot be misread:

======  ====  =======================================================
offset  size  content
======  ====  =======================================================
0       8     magic ``FGPT2TOK``
8       4     version, 1
12      4     bytes per id: 2 (uint16) or 4 (uint32)
16      8     vocabulary size V
24      8     number of ids
32      32    sha256 of the ids' bytes
64      32    tokenizer's name, UTF-8, zero-padded
96      32    tokenizer's fingerprint, likewise
128     124   zeros
252     4     CRC-32 of the 252 bytes before it
======  ====  =======================================================
"""

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import ArrayLike

from fastgpt2.errors import UserError
from fastgpt2.files import atomic_path
from fastgpt2.text.encoding import Tokenizer
from fastgpt2.text.stored import (
    BLOCK_IDS,
    DType,
    StoredTokens,
    TokenFile,
    check_ids,
    verifying,
)

MAGIC = b"FGPT2TOK"
VERSION = 1
HEADER_BYTES = 256
SUFFIX = ".tokens"
_FIELDS = struct.Struct("<8sIIQQ32s32s32s")
_DTYPES: dict[int, DType] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def dtype_for(vocab_size: int) -> DType:
    """uint16 if every id fits, else uint32."""
    return _DTYPES[2 if vocab_size <= 1 << 16 else 4]


@dataclass(frozen=True)
class ShardHeader:
    """The description of a shard's ids."""

    itemsize: int
    vocab_size: int
    count: int
    sha256: bytes
    tokenizer: str
    fingerprint: str

    @property
    def dtype(self) -> DType:
        """Type of the ids in the file."""
        return _DTYPES[self.itemsize]

    def pack(self) -> bytes:
        """The 256 bytes at the beginning of the file."""
        fields = _FIELDS.pack(
            MAGIC,
            VERSION,
            self.itemsize,
            self.vocab_size,
            self.count,
            self.sha256,
            self.tokenizer.encode("utf-8"),
            self.fingerprint.encode("utf-8"),
        ).ljust(HEADER_BYTES - 4, b"\0")
        return fields + struct.pack("<I", zlib.crc32(fields))

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read and check the header of a shard, and the file's size against it.

        Raises:
            UserError: not a shard, a newer version, a damaged header, a dtype too small for the
                vocabulary, or a file longer or shorter than its header says.
        """
        try:
            with open(path, "rb") as file:
                data = file.read(HEADER_BYTES)
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise UserError(f"token shard {path}: cannot be read: {error.strerror}") from error
        if data[:8] != MAGIC:
            raise UserError(f"token shard {path}: expected magic {MAGIC!r}, got {data[:8]!r}")
        if len(data) < HEADER_BYTES:
            raise UserError(f"token shard {path}: header has {len(data)} of {HEADER_BYTES} bytes")
        _, version, itemsize, vocab_size, count, sha256, name, mark = _FIELDS.unpack_from(data)
        if version != VERSION:
            raise UserError(f"token shard {path}: expected version {VERSION}, got {version}")
        if zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
            raise UserError(f"token shard {path}: the header is damaged (its CRC-32 differs)")
        if itemsize not in _DTYPES or itemsize < dtype_for(vocab_size).itemsize:
            raise UserError(
                f"token shard {path}: {itemsize} bytes per id cannot hold a vocabulary of "
                f"{vocab_size}"
            )
        if size != HEADER_BYTES + count * itemsize:
            raise UserError(
                f"token shard {path}: {count} ids of {itemsize} bytes make "
                f"{HEADER_BYTES + count * itemsize} bytes, the file has {size}"
            )
        texts = [field.rstrip(b"\0").decode("utf-8", "replace") for field in (name, mark)]
        return cls(itemsize, vocab_size, count, sha256, *texts)


class IdWriter:
    """Appends ids to a file and keeps their count and checksum.

    Args:
        file: the open file.
        name: what error messages call it.
        vocab_size: V; every id is in [0, V).
        dtype: type of the ids in the file.
    """

    def __init__(self, file: BinaryIO, name: str, vocab_size: int, dtype: DType) -> None:
        self.count = 0
        self._file = file
        self._name = name
        self._vocab_size = vocab_size
        self._dtype = dtype
        self._digest = hashlib.sha256()

    def write(self, ids: ArrayLike) -> None:
        """Append ids; a UserError names one that is not in the vocabulary."""
        array = np.asarray(ids)
        check_ids(array, self._vocab_size, self._name, first=self.count)
        data = array.astype(self._dtype).tobytes()
        self._digest.update(data)
        self._file.write(data)
        self.count += array.size

    @property
    def sha256(self) -> bytes:
        """Checksum of the ids written so far."""
        return self._digest.digest()


class ShardWriter(IdWriter):
    """The writer of ``create_shard``, which also makes the header."""

    def __init__(self, file: BinaryIO, name: str, tokenizer: Tokenizer, dtype: DType) -> None:
        super().__init__(file, name, tokenizer.vocab_size, dtype)
        self._tokenizer = tokenizer

    @property
    def header(self) -> ShardHeader:
        """The header for the ids written so far."""
        return ShardHeader(
            self._dtype.itemsize,
            self._tokenizer.vocab_size,
            self.count,
            self.sha256,
            self._tokenizer.name,
            self._tokenizer.fingerprint,
        )


@contextmanager
def create_shard(
    path: str | Path, tokenizer: Tokenizer, *, dtype: DType | None = None
) -> Iterator[ShardWriter]:
    """Write one shard; the file appears under its name if the ``with`` block succeeds.

    Args:
        path: the shard's file.
        tokenizer: whose ids it holds; its name and fingerprint go into the header.
        dtype: uint16 or uint32; None for the smaller one that holds the vocabulary.

    Raises:
        UserError: ``dtype`` cannot hold V ids.
    """
    smallest = dtype_for(tokenizer.vocab_size)
    dtype = smallest if dtype is None else np.dtype(dtype).newbyteorder("<")
    if dtype not in _DTYPES.values() or dtype.itemsize < smallest.itemsize:
        raise UserError(
            f"token shard {path}: {dtype} cannot hold the vocabulary of {tokenizer.vocab_size}, "
            f"{smallest} can"
        )
    with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
        file.write(bytes(HEADER_BYTES))
        writer = ShardWriter(file, f"token shard {path}", tokenizer, dtype)
        yield writer
        file.seek(0)
        file.write(writer.header.pack())


class TokenShards(StoredTokens):
    """Several shards as one read-only sequence of ids: ``len(shards)``, ``shards[start:stop]``.

    Args:
        paths: the shards, in their order.

    Raises:
        UserError: a shard cannot be used (see ``ShardHeader.read``), or the shards have different
            vocabularies.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        if not paths:
            raise UserError("token shards: no files given")
        self.paths = tuple(Path(path) for path in paths)
        self.headers = tuple(ShardHeader.read(path) for path in self.paths)
        first = self.headers[0]
        for path, header in zip(self.paths, self.headers, strict=True):
            if header.fingerprint != first.fingerprint or header.vocab_size != first.vocab_size:
                raise UserError(
                    f"token shard {path}: tokenizer {header.tokenizer} {header.fingerprint} "
                    f"({header.vocab_size} ids), but {self.paths[0]} has {first.tokenizer} "
                    f"{first.fingerprint} ({first.vocab_size} ids)"
                )
        self.tokenizer = first.tokenizer
        self.fingerprint = first.fingerprint
        files = [
            TokenFile(path, HEADER_BYTES, header.dtype, header.count)
            for path, header in zip(self.paths, self.headers, strict=True)
        ]
        super().__init__(files, first.vocab_size, kind="token shard")

    def verify(self) -> None:
        """Read everything once, with a progress bar if it takes long.

        Raises:
            UserError: an id is outside the vocabulary, or ids do not match their checksum.
        """
        with verifying(len(self)) as bar:
            for shard, header in enumerate(self.headers):
                digest = hashlib.sha256()
                for offset in range(0, header.count, BLOCK_IDS):
                    count = min(BLOCK_IDS, header.count - offset)
                    digest.update(self._read(shard, offset, count).tobytes())
                    bar.update(count)
                if digest.digest() != header.sha256:
                    raise UserError(
                        f"token shard {self.paths[shard]}: expected sha256 "
                        f"{header.sha256.hex()}, got {digest.hexdigest()}"
                    )

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[Path, ...]]]:
        return type(self), (self.paths,)
