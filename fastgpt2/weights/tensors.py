"""LazyTensor: a tensor in a file, with known shape and dtype.

A checkpoint is a table of these. Readers check every bound against the file's size before they
allocate. Values are memory-mapped on demand, one tensor at a time, and unmapped when the tensor is
freed, so that loading a model needs little more memory than the model.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgpt2.errors import UserError


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file: ``read()`` maps its values; shape and dtype are known before."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def transposed(self) -> "LazyTensor":
        """The transpose of a matrix."""
        return replace(self, shape=self.shape[::-1], read=lambda: self.read().t())

    def reshaped(self, *shape: int) -> "LazyTensor":
        """The same values in another shape."""
        return replace(self, shape=shape, read=lambda: self.read().reshape(shape))

    def rows(self, count: int) -> "LazyTensor":
        """The first ``count`` rows."""
        return replace(self, shape=(count, *self.shape[1:]), read=lambda: self.read()[:count])

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """The values rounded to ``dtype``."""
        return replace(self, dtype=dtype, read=lambda: self.read().to(dtype))

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        """A tensor in memory."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: torch.dtype) -> "LazyTensor":
        """Zeros, allocated when read."""
        return cls(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))


def map_bytes(path: Path, offset: int, size: int) -> NDArray[np.uint8]:
    """``size`` bytes of a file, memory-mapped copy-on-write: writes never reach the file."""
    try:
        return np.memmap(path, np.uint8, "c", offset, (size,))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot map {size} bytes at {offset}: {error}") from None


def map_tensor(
    path: Path,
    offset: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    name: str,
    check: Callable[[NDArray[np.uint8]], None] | None = None,
) -> LazyTensor:
    """The contiguous little-endian tensor at ``offset`` bytes into a file.

    Args:
        path: the file.
        offset: position of the first byte.
        shape: shape of the tensor.
        dtype: type of its elements.
        name: what messages call it.
        check: called with the raw bytes at each read, to raise on a wrong checksum.

    Raises:
        UserError: the tensor does not lie within the file.
    """
    size = prod(shape) * dtype.itemsize
    try:
        available = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (it should hold {name!r})") from None
    if offset < 0 or offset + size > available:
        raise UserError(
            f"{path}: truncated: {name!r} needs bytes {offset} to {offset + size}, "
            f"the file has {available}"
        )

    def read() -> Tensor:
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        raw = map_bytes(path, offset, size)
        if check is not None:
            check(raw)
        # torch needs aligned elements: a copy has them
        raw = np.array(raw) if offset % dtype.itemsize else raw
        return torch.from_numpy(raw).view(dtype).reshape(shape)

    return LazyTensor(shape, dtype, read)


def check_total(tensors: Iterable[LazyTensor], paths: Iterable[Path], source: Path) -> None:
    """Refuse tensors larger than their files: a small file must not become a huge model."""
    needed = sum(tensor.nbytes for tensor in tensors)
    available = sum(path.stat().st_size for path in paths)
    if needed > available:
        raise UserError(f"{source}: its tensors take {needed} bytes, its files have {available}")


def as_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor in row-major order, without a copy if it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
