"""TensorFlow's checkpoint format (a "tensor bundle"), read and written without TensorFlow.

``PREFIX.index`` is a sorted string table: the empty key holds a BundleHeaderProto (number of
shards, byte order), every other key is a variable's name and holds a BundleEntryProto (dtype,
shape, shard, offset, size, masked CRC-32C). ``PREFIX.data-00000-of-00001`` ... are the shards: raw
little-endian values.

Format: tensorflow/core/protobuf/tensor_bundle.proto, tensor_shape.proto and
tensorflow/core/util/tensor_bundle/ in https://github.com/tensorflow/tensorflow
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastgpt2.errors import UserError
from fastgpt2.weights.crc32c import crc32c, mask
from fastgpt2.weights.metadata import file_size
from fastgpt2.weights.protobuf import read_fields, write_field
from fastgpt2.weights.sstable import read_table, write_table
from fastgpt2.weights.tensors import LazyTensor, as_bytes, map_tensor

# tensorflow/core/framework/types.proto; strings, resources and the like have no fixed size
NUMBERED_DTYPES = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    4: torch.uint8,
    5: torch.int16,
    6: torch.int8,
    8: torch.complex64,
    9: torch.int64,
    10: torch.bool,
    14: torch.bfloat16,
    17: torch.uint16,
    18: torch.complex128,
    19: torch.float16,
    22: torch.uint32,
    23: torch.uint64,
}
NUMBERS = {dtype: number for number, dtype in NUMBERED_DTYPES.items()}

# an index has only names and numbers: about 20 kB for gpt2-xl
MAX_INDEX_BYTES = 16 << 20
MAX_RANK = 8


@dataclass(frozen=True)
class Entry:
    """One variable of the index; ``dtype`` is TensorFlow's number."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    sliced: bool


def _integer(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("a message has bytes where a number belongs")
    return value


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a message has a number where bytes belong")
    return value


def _shape(message: bytes) -> tuple[int, ...]:
    dims = []
    for number, value in read_fields(message):
        if number == 2:
            sizes = [_integer(size) for field, size in read_fields(_message(value)) if field == 1]
            dims.append(sizes[-1] if sizes else 0)
        elif number == 3 and value:
            raise ValueError("a variable has an unknown rank")
    if len(dims) > MAX_RANK:
        raise ValueError(f"a variable has {len(dims)} dimensions, more than {MAX_RANK}")
    return tuple(dims)


def _entry(message: bytes) -> Entry:
    shape: tuple[int, ...] = ()
    numbers = dict.fromkeys((1, 3, 4, 5, 6), 0)
    sliced = False
    for number, value in read_fields(message):
        if number == 2:
            shape = _shape(_message(value))
        elif number == 7:
            sliced = True
        elif number in numbers:
            numbers[number] = _integer(value)
    dtype, shard, offset, size, crc = numbers.values()
    return Entry(dtype, shape, shard, offset, size, crc, sliced)


class Bundle:
    """A TensorFlow checkpoint, opened for reading.

    Args:
        prefix: path of the checkpoint without ``.index`` and ``.data-*``.

    Raises:
        UserError: the index is missing, cut off, corrupt or of a form that cannot be read.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.index = prefix.with_name(prefix.name + ".index")
        try:
            size = file_size(self.index)
            if size > MAX_INDEX_BYTES:
                raise ValueError(f"{size} bytes are too many for a checkpoint's index")
            table = read_table(self.index.read_bytes())
            header = dict(read_fields(table.pop(b"", b"")))
            self.shards = _integer(header.get(1, 0))
            if header.get(2, 0) != 0:
                raise ValueError("written on a big-endian machine, which is not supported")
            # the slices of a partitioned variable have binary keys
            self.entries = {
                key.decode("utf-8", "backslashreplace"): _entry(value)
                for key, value in table.items()
            }
        except OSError as error:
            raise UserError(f"{self.index}: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{self.index}: {error}") from None

    def _check_crc(self, name: str, path: Path, raw: NDArray[np.uint8]) -> None:
        if mask(crc32c(raw)) != self.entries[name].crc:
            raise UserError(f"{path}: the values of {name!r} have a wrong CRC-32C")

    def shard(self, name: str) -> Path:
        """The file with the values of the variable ``name``."""
        return shard_path(self.prefix, self.entries[name].shard, self.shards)

    def tensor(self, name: str) -> LazyTensor:
        """The variable ``name``; its CRC is checked whenever it is read.

        Raises:
            UserError: no such variable, a type or form that cannot be read, a missing or
                truncated shard; at reading, a wrong CRC.
        """
        if name not in self.entries:
            raise UserError(f"{self.index}: has no variable {name!r}")
        entry = self.entries[name]
        if entry.dtype not in NUMBERED_DTYPES:
            raise UserError(
                f"{self.index}: {name!r} has TensorFlow's type {entry.dtype}, no number"
            )
        if entry.sliced:
            raise UserError(f"{self.index}: {name!r} is a partitioned variable, not supported")
        dtype = NUMBERED_DTYPES[entry.dtype]
        if prod(entry.shape) * dtype.itemsize != entry.size:
            raise UserError(
                f"{self.index}: {name!r} of shape {entry.shape} and type {dtype} "
                f"cannot take {entry.size} bytes"
            )
        if entry.shard >= self.shards:
            raise UserError(
                f"{self.index}: {name!r} is said to lie in shard {entry.shard} of {self.shards}"
            )
        path = self.shard(name)
        check = partial(self._check_crc, name, path)
        return map_tensor(path, entry.offset, entry.shape, dtype, name=name, check=check)


def shard_path(prefix: Path, shard: int, shards: int) -> Path:
    """File of one shard: ``PREFIX.data-00000-of-00001``."""
    return prefix.with_name(f"{prefix.name}.data-{shard:05}-of-{shards:05}")


def write_bundle(prefix: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write ``tensors`` as a TensorFlow checkpoint of one shard, one tensor in memory at a time.

    The folder of ``prefix`` must not be visible to any reader yet.
    """
    # BundleHeaderProto: one shard, little-endian, version.producer = 1
    index = {b"": write_field(1, 1) + write_field(3, write_field(1, 1))}
    offset = 0
    with shard_path(prefix, 0, 1).open("wb") as shard:
        for name, tensor in sorted(tensors.items()):
            raw = as_bytes(tensor.read())
            dims = (write_field(2, write_field(1, size)) for size in tensor.shape)
            entry = write_field(1, NUMBERS[tensor.dtype]) + write_field(2, b"".join(dims))
            # proto3 omits zeros
            entry += write_field(4, offset) if offset else b""
            entry += write_field(5, len(raw))
            entry += write_field(6, mask(crc32c(np.asarray(raw))), fixed32=True)
            index[name.encode()] = entry
            shard.write(raw)
            offset += len(raw)
    prefix.with_name(prefix.name + ".index").write_bytes(write_table(index))
