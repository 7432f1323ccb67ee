"""A sharded checkpoint: safetensors files that each hold a part of every tensor.

``torch.distributed.checkpoint`` writes one or two files from each process. The header of a file
has ``DCP_SHARDING_INFO``: for each tensor in it, where its part begins in the whole tensor. The
parts are joined here, for any number of processes.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt2.errors import UserError
from fastgpt2.weights.metadata import shown
from fastgpt2.weights.safetensors_file import read_metadata, read_safetensors
from fastgpt2.weights.tensors import LazyTensor

# keys of the header's entry, and in it of the offsets of a tensor's part
_INFO, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
# prefix of the weights' names; the other tensors are training state
WEIGHTS = "model."
_EMBEDDING = "transformer.wte.weight"


# offsets of a part, and the part
_Part = tuple[tuple[int, ...], LazyTensor]


def read_shards(folder: Path, vocab_size: int) -> dict[str, LazyTensor]:
    """Name to whole tensor, without the padding of the vocabulary.

    Args:
        folder: holds these files and no others.
        vocab_size: rows of the token embedding and its moments.

    Raises:
        UserError: a file is damaged, or parts are missing.
    """
    found: dict[str, list[_Part]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        info = _sharding_info(file)
        for name, part in read_safetensors(file).items():
            place = _offsets(info, name, len(part.shape), file)
            found.setdefault(name, []).append((place, part))
    if not found:
        raise UserError(f"{folder}: no shards in it")
    tensors = {name: _whole(name, parts, folder) for name, parts in found.items()}
    return {
        name: tensor.rows(vocab_size)
        if name.endswith(_EMBEDDING) and tensor.shape and tensor.shape[0] > vocab_size
        else tensor
        for name, tensor in tensors.items()
    }


def _sharding_info(file: Path) -> dict[str, Any]:
    header = read_metadata(file)
    try:
        info = json.loads(header[_INFO])
    except (KeyError, ValueError, RecursionError):
        raise UserError(f"{file}: not a shard: {_INFO} is missing in its header") from None
    if not isinstance(info, dict):
        raise UserError(f"{file}: not a shard: {_INFO} is {shown(info)}")
    return info


def _offsets(info: dict[str, Any], name: str, dimensions: int, file: Path) -> tuple[int, ...]:
    entry = info.get(name)
    offsets = entry.get(_OFFSETS) if isinstance(entry, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != dimensions
        or not all(type(x) is int and x >= 0 for x in offsets)
    ):
        raise UserError(f"{file}: {shown(name)} must have {dimensions} offsets, got {shown(entry)}")
    return tuple(offsets)


def _whole(name: str, found: list[_Part], folder: Path) -> LazyTensor:
    """The tensor whose rows are those of the parts in order."""
    # a part may have no rows
    order = sorted(found, key=lambda part: (part[0], part[1].shape))
    first = order[0][1]
    if len(order) == 1 and not any(order[0][0]):
        return first
    rows = 0
    for place, part in order:
        fits = (part.dtype, part.shape[1:]) == (first.dtype, first.shape[1:])
        if not part.shape or not fits or place[0] != rows or any(place[1:]):
            raise UserError(f"{folder}: the shards of {shown(name)} do not fit together")
        rows += part.shape[0]

    def read() -> Tensor:
        return torch.cat([part.read() for _, part in order])

    return LazyTensor((rows, *first.shape[1:]), first.dtype, read)
