"""Token ids in files as one read-only sequence, read piece by piece in bounded memory."""

import hashlib
import os
import sys
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastgpt2 import streams
from fastgpt2.errors import FileChangedError, UserError
from fastgpt2.files import naming

DType = np.dtype[Any]

# ids in memory at once while all are read
BLOCK_IDS = 1 << 20
# held while reading moves a file's position
_SEEKING = threading.Lock()


@dataclass(frozen=True)
class TokenFile:
    """The place of the ids in one file.

    Attributes:
        path: the file.
        offset: bytes before the first id.
        dtype: type of the ids, little-endian.
        count: number of ids.
    """

    path: Path
    offset: int
    dtype: DType
    count: int


def check_ids(ids: NDArray[Any], vocab_size: int, where: str, *, first: int = 0) -> None:
    """Raise a UserError that names the first id outside [0, vocab_size) and its position.

    Args:
        ids: any integers.
        vocab_size: V.
        where: what the error message calls them.
        first: position of the first id.
    """
    if not ids.size:
        return
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{where}: ids must be integers, got {ids.dtype}")
    if ids.max() < vocab_size and (ids.dtype.kind == "u" or ids.min() >= 0):
        return
    position = int(np.argmax((ids >= vocab_size) | (ids < 0)))
    raise UserError(
        f"{where}: id {ids[position]} at position {first + position} is not in the vocabulary of "
        f"{vocab_size}"
    )


class StoredTokens:
    """The ids of several files in order: ``len(tokens)``, ``tokens[start:stop]``.

    A slice is read into a new array; nothing else stays in memory. A long-lived memory map is not
    used, because its pages count as the process's memory until the system reclaims them, which ends
    runs with a memory limit (karpathy/nanoGPT#287). Slices are checked against the vocabulary when
    they are read, so no damaged id reaches an embedding.

    Args:
        files: the place of the ids in each file.
        vocab_size: V; every id is in [0, V).
        kind: what error messages call a file.
        start, stop: the part of the ids that is used; None means to the end.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        vocab_size: int,
        *,
        kind: str = "token file",
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        self.files = tuple(files)
        self.vocab_size = vocab_size
        self.kind = kind
        # the widest dtype of the files
        self.dtype = max((file.dtype for file in self.files), key=lambda d: d.itemsize)
        self._ends = np.cumsum([file.count for file in self.files]).tolist()
        self._start, self._stop, _ = slice(start, stop).indices(int(self._ends[-1]))
        # digest of the ids, independent of the files; known after `check`
        self.sha256: bytes | None = None
        self._open = [file.path.open("rb", buffering=0) for file in self.files]

    def __len__(self) -> int:
        return max(0, self._stop - self._start)

    def __getitem__(self, key: slice) -> NDArray[Any]:
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise ValueError(f"{self.kind}s: slices have step 1, got {step}")
        out = np.empty(max(0, stop - start), self.dtype)
        at, done = self._start + start, 0
        while done < out.size:
            number = bisect_right(self._ends, at + done)
            begin = self._ends[number] - self.files[number].count
            count = min(self._ends[number] - (at + done), out.size - done)
            out[done : done + count] = self._read(number, at + done - begin, count)
            done += count
        return out

    def _read(self, number: int, offset: int, count: int) -> NDArray[Any]:
        file = self.files[number]
        itemsize = file.dtype.itemsize
        with naming(file.path):
            data = _read_at(self._open[number], file.offset + offset * itemsize, count * itemsize)
        if len(data) != count * itemsize:
            reason = "the file became shorter while it was in use"
            raise FileChangedError(f"{self.kind} {file.path}: {reason}")
        ids = np.frombuffer(data, file.dtype)
        check_ids(ids, self.vocab_size, f"{self.kind} {file.path}", first=offset)
        return ids

    def blocks(self) -> Iterator[NDArray[Any]]:
        """All ids in order, ``BLOCK_IDS`` at a time."""
        for start in range(0, len(self), BLOCK_IDS):
            yield self[start : start + BLOCK_IDS]

    def check(self, token_bytes: NDArray[np.int64]) -> int:
        """Read all ids once; returns the number of UTF-8 bytes that they stand for.

        Args:
            token_bytes: bytes of each id, (V,).

        Raises:
            UserError: an id is outside the vocabulary.
        """
        digest, total = hashlib.sha256(), 0
        with verifying(len(self)) as bar:
            for ids in self.blocks():
                digest.update(ids.tobytes())
                total += int(token_bytes[ids].sum())
                bar.update(ids.size)
        self.sha256 = digest.digest()
        return total

    def part(self, start: int, stop: int | None = None) -> "StoredTokens":
        """The ids from ``start`` up to ``stop``, or to the end, as a new sequence."""
        first, last, _ = slice(start, stop).indices(len(self))
        begin = self._start
        return StoredTokens(
            self.files, self.vocab_size, kind=self.kind, start=begin + first, stop=begin + last
        )

    def close(self) -> None:
        """Close the files."""
        for file in self._open:
            file.close()

    # worker processes of a torch DataLoader open the files themselves
    def __reduce__(self) -> Any:
        options = {"kind": self.kind, "start": self._start, "stop": self._stop}
        return _reopen, (type(self), (self.files, self.vocab_size), options)


@dataclass(frozen=True)
class JoinedTokens:
    """Several sequences of ids joined into one; only slices are copied.

    Attributes:
        tokens: the sequences.
    """

    tokens: "tuple[TokenSequence, ...]"

    def __len__(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def dtype(self) -> DType:
        """A type that holds the ids of all sequences."""
        return np.result_type(*(part.dtype for part in self.tokens))

    def __getitem__(self, key: slice) -> NDArray[Any]:
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise ValueError(f"joined tokens: slices have step 1, got {step}")
        parts, begin = [np.empty(0, self.dtype)], 0
        for part in self.tokens:
            first, last = max(start - begin, 0), min(stop - begin, len(part))
            if first < last:
                parts.append(part[first:last])
            begin += len(part)
        return np.concatenate(parts)

    def leaves(self) -> Iterator[NDArray[Any] | StoredTokens]:
        """The sequences; joined ones are replaced by their own sequences, recursively."""
        for part in self.tokens:
            if isinstance(part, JoinedTokens):
                yield from part.leaves()
            else:
                yield part


TokenSequence = NDArray[Any] | StoredTokens | JoinedTokens


def _reopen(kind: type[StoredTokens], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return kind(*arguments, **options)


def verifying(total: int) -> "tqdm[Any]":
    """A progress bar over ids that are checked; it appears only if that takes long.

    Args:
        total: number of ids.
    """
    return tqdm(
        total=total, desc="verifying", unit="token", unit_scale=True, delay=streams.BAR_DELAY
    )


def _read_at(file: Any, offset: int, count: int) -> bytes:
    """``count`` bytes at ``offset``, without moving a position that a forked process shares."""
    if sys.platform == "win32":
        # one thread reads batches ahead while another evaluates
        with _SEEKING:
            file.seek(offset)
            return bytes(file.read(count))
    parts = []
    while count and (part := os.pread(file.fileno(), count, offset)):
        parts.append(part)
        offset, count = offset + len(part), count - len(part)
    return b"".join(parts)
