"""Files of ``torch.save``, opened safely and lazily.

``torch.load`` with ``weights_only`` refuses every pickle that needs more than tensors and plain
values. On the meta device it reads no values and only records their place in the file; they are
mapped from there on demand.
"""

import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fastgpt2.errors import UserError
from fastgpt2.weights.checkpoint import HEAD
from fastgpt2.weights.metadata import file_size, shown
from fastgpt2.weights.tensors import LazyTensor, check_total, map_tensor

ZIP_MAGIC = b"PK\x03\x04"


def read_torch(path: Path) -> dict[str, Any]:
    """The dictionary in ``path``; its tensors have no values yet, see ``lazy_tensors``.

    Raises:
        UserError: the file is missing, damaged or compressed, holds objects other than tensors and
            plain values (which could run code), or is not a dictionary with text keys.
    """
    try:
        file_size(path)
        zipped = _check_memory(path)
        # files from before torch 1.6 have no index and must be read as a whole
        device = "meta" if zipped else "cpu"
        content = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UserError:
        raise
    except Exception as error:
        # a damaged pickle can raise anything
        raise UserError(f"{path}: {_reason(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: expected a dictionary of tensors by name")
    return content


def _check_memory(path: Path) -> bool:
    """Refuse a file that needs more memory than its size; returns whether it is a zip archive."""
    with path.open("rb") as file:
        if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
            # before torch 1.6: magic number, version, system, the object, names of the storages
            file.seek(0)
            for _ in range(5):
                _check_pickle(path, file)
            return False
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                # torch never compresses
                if record.compress_type != zipfile.ZIP_STORED:
                    raise UserError(f"{path}: {shown(record.filename)} is compressed: refused")
                if record.filename.endswith("/data.pkl"):
                    with archive.open(record) as pickled:
                        _check_pickle(path, pickled)
    return True


def _check_pickle(path: Path, pickled: IO[bytes]) -> None:
    # the only allowed call that takes a size: bytearray(10**10)
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL" and str(argument).endswith(" bytearray"):
            raise UserError(f"{path}: refused: it asks for a bytearray; only tensors are loaded")


def _reason(error: Exception) -> str:
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"refused: it asks for {found[1]}, and could run code; only tensors are loaded"
    line = shown(next(iter(str(error).splitlines()), ""))
    return f"not a file of torch.save that can be loaded safely ({type(error).__name__}: {line})"


def write_torch(content: dict[str, Any], file: IO[bytes]) -> None:
    """``torch.save`` into an open file; the error that interrupts a write is raised unchanged.

    PyTorch's writer closes its archive after a failed write, which would raise a ``RuntimeError``
    about positions instead.
    """
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if error.__context__ is not None:
            raise error.__context__ from None
        raise


def lazy_tensors(path: Path, content: dict[str, Any]) -> dict[str, LazyTensor]:
    """The state dict ``content``, taken from ``read_torch(path)``, as lazy tensors."""
    tensors = {name: _lazy(path, name, value) for name, value in content.items()}
    # the tied head is a second name for the same bytes
    check_total((t for name, t in tensors.items() if not name.endswith(HEAD)), [path], path)
    return tensors


def _lazy(path: Path, name: str, value: object) -> LazyTensor:
    if (
        not isinstance(value, Tensor)
        or value.layout != torch.strided
        or value.is_quantized
        or value.is_conj()
        or value.is_neg()
    ):
        raise UserError(f"{path}: {shown(name)} is not a plain tensor")
    if value.device.type != "meta":
        return LazyTensor.of(value.detach())
    storage = value.untyped_storage()._checkpoint_offset
    if storage is None:
        raise UserError(f"{path}: {shown(name)} has no values in the file")
    shape, stride = tuple(value.shape), value.stride()
    offset = storage + int(value.storage_offset()) * value.dtype.itemsize
    if value.is_contiguous():
        return map_tensor(path, offset, shape, value.dtype, name=name)
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    flat = map_tensor(path, offset, (extent,), value.dtype, name=name)
    return LazyTensor(shape, value.dtype, lambda: flat.read().as_strided(shape, stride))
