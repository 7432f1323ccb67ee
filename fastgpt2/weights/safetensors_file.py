"""Safetensors files: opened lazily, written one tensor at a time.

Eight bytes hold the length of a JSON header (name -> dtype, shape, place), then come the header and
the values. The safetensors library reads; its writer needs every tensor in memory at once, ours
streams. Format: https://huggingface.co/docs/safetensors/index#format
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastgpt2.errors import UserError
from fastgpt2.text.utf8 import is_utf8
from fastgpt2.weights.metadata import file_size, shown
from fastgpt2.weights.tensors import LazyTensor, as_bytes

NAMED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in NAMED_DTYPES.items()}
# bytes that are written at a time
_PIECE = 2**20


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Name to tensor for every tensor of the file.

    Raises:
        UserError: the file is missing, cut off or not in this format.
    """

    def lazy(name: str, part: Any) -> LazyTensor:
        if part.get_dtype() not in NAMED_DTYPES:
            raise UserError(f"{path}: {shown(name)} has dtype {part.get_dtype()}, not supported")

        # open the file for every tensor, so that its memory map ends with the tensor
        def read() -> Tensor:
            with _open(path) as file:
                tensor: Tensor = _checked(path, file.get_tensor, name)
                return tensor

        return LazyTensor(tuple(part.get_shape()), NAMED_DTYPES[part.get_dtype()], read)

    with _open(path) as file:
        return {name: lazy(name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the file's header.

    Raises:
        UserError: as ``read_safetensors``.
    """
    with _open(path) as file:
        return dict(file.metadata() or {})


def _open(path: Path) -> Any:
    _checked(path, file_size, path)
    if not is_utf8(str(path)):
        raise UserError(f"{path}: the path must be UTF-8 text for the library safetensors")
    # of a file that may not be read, the library says that there is none
    with _checked(path, path.open, "rb"):
        pass
    return _checked(path, safe_open, str(path), "pt")


def _checked(path: Path, call: Any, *args: str | Path) -> Any:
    try:
        return call(*args)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except RuntimeError as error:
        # PyTorch opens it again, to map it: it may be gone by then, or memory may be short
        raise UserError(f"{path}: cannot be read: {shown(str(error))}") from None
    except SafetensorError as error:
        # the message can quote the file, including terminal control characters
        raise UserError(f"{path}: not a safetensors file: {shown(str(error))}") from None


def write_safetensors(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    also: Callable[[bytes | memoryview], None] | None = None,
) -> None:
    """Write ``tensors``, those of the widest dtype first, one in memory at a time.

    Other threads can run while a piece of a tensor is written.

    Args:
        path: must not be visible to any reader yet.
        tensors: by name.
        metadata: texts for the header.
        also: gets all that is written, piece by piece, such as the ``update`` of a digest.
    """
    # values then begin at a multiple of their size
    order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in order:
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # values start on a multiple of eight bytes
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:

        def put(data: bytes | memoryview) -> None:
            # small enough for the processor's cache, which then has it for the digest
            for begin in range(0, len(data), _PIECE):
                piece = data[begin : begin + _PIECE]
                file.write(piece)
                if also is not None:
                    also(piece)

        put(len(text).to_bytes(8, "little") + text)
        for _, tensor in order:
            put(as_bytes(tensor.read()))
