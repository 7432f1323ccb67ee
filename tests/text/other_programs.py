"""Token files as their own programs write them: from the formats' descriptions, not our writers."""

import pickle
from array import array
from collections.abc import Sequence
from pathlib import Path


def little_endian(kind: str, numbers: Sequence[int]) -> bytes:
    return b"".join(number.to_bytes(array(kind).itemsize, "little") for number in numbers)


def write_llmc(path: Path, ids: Sequence[int]) -> Path:
    """llm.c, dev/data/data_common.py: 256 int32 (magic, version, count), then uint16."""
    header = [20240520, 1, len(ids)] + [0] * 253
    path.write_bytes(little_endian("i", header) + little_endian("H", ids))
    return path


def write_nanogpt(folder: Path, train: Sequence[int], val: Sequence[int]) -> Path:
    """nanoGPT, data/openwebtext/prepare.py: uint16 and nothing else."""
    folder.mkdir(exist_ok=True)
    (folder / "train.bin").write_bytes(little_endian("H", train))
    (folder / "val.bin").write_bytes(little_endian("H", val))
    return folder


def write_meta(folder: Path, chars: str) -> None:
    """nanoGPT, data/shakespeare_char/prepare.py: the vocabulary as a pickle."""
    itos = dict(enumerate(chars))
    meta = {"vocab_size": len(chars), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def read_uint16(path: Path, offset: int = 0) -> list[int]:
    data = path.read_bytes()[offset:]
    return [int.from_bytes(data[i : i + 2], "little") for i in range(0, len(data), 2)]
