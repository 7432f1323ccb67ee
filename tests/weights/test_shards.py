"""Shards put together: whole tensors, or one line that names the file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastgpt2.errors import UserError
from fastgpt2.weights.shards import read_shards

WTE = torch.arange(20.0).view(10, 2)
WEIGHT = torch.arange(12.0).view(4, 3)


def write_shard(folder: Path, name: str, tensors: dict[str, tuple[Any, Tensor]]) -> Path:
    """A file of parts, each with its offsets."""
    info = {key: {"saved_offsets": offsets} for key, (offsets, _) in tensors.items()}
    parts = {key: part.contiguous() for key, (_, part) in tensors.items()}
    path = folder / name
    save_file(parts, path, metadata={"DCP_SHARDING_INFO": json.dumps(info)})
    return path


def test_parts_are_put_together_without_the_padding(tmp_path: Path) -> None:
    wte = "model.transformer.wte.weight"
    last = {wte: ([6, 0], WTE[6:]), "x": ([4, 0], WEIGHT[4:]), "step": ([], torch.tensor(3.0))}
    # files in no order, a part without rows
    write_shard(tmp_path, "a.safetensors", last)
    write_shard(tmp_path, "b.safetensors", {wte: ([0, 0], WTE[:6]), "x": ([1, 0], WEIGHT[1:])})
    write_shard(tmp_path, "c.safetensors", {"x": ([0, 0], WEIGHT[:1])})
    tensors = read_shards(tmp_path, 9)
    assert tensors[wte].shape == (9, 2) and tensors[wte].read().equal(WTE[:9])
    assert tensors["x"].shape == (4, 3) and tensors["x"].read().equal(WEIGHT)
    assert tensors["step"].read().item() == 3.0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # a gap, an overlap, no beginning; fewer columns, another dtype, other columns
        (([0, 0], WEIGHT[:1]), ([2, 0], WEIGHT[2:])),
        (([0, 0], WEIGHT[:3]), ([2, 0], WEIGHT[2:])),
        (([1, 0], WEIGHT[1:2]), ([2, 0], WEIGHT[2:])),
        (([0, 0], WEIGHT[:2]), ([2, 0], WEIGHT[2:, :2])),
        (([0, 0], WEIGHT[:2]), ([2, 0], WEIGHT[2:].half())),
        (([0, 0], WEIGHT[:2]), ([2, 1], WEIGHT[2:])),
        (([], torch.tensor(1.0)), ([], torch.tensor(1.0))),
    ],
)
def test_parts_that_do_not_fit(
    tmp_path: Path, first: tuple[list[int], Tensor], second: tuple[list[int], Tensor]
) -> None:
    write_shard(tmp_path, "a.safetensors", {"x": first})
    write_shard(tmp_path, "b.safetensors", {"x": second})
    with pytest.raises(UserError, match=f"{tmp_path}: the shards of 'x' do not fit together"):
        read_shards(tmp_path, 4)


@pytest.mark.parametrize("offsets", [None, [0], [-1, 0], [0.0, 0], [True, 0], "00", [2**70, 0]])
def test_damaged_offsets(tmp_path: Path, offsets: Any) -> None:
    write_shard(tmp_path, "a.safetensors", {"x": (offsets, WEIGHT)})
    with pytest.raises(UserError, match="'x'"):
        read_shards(tmp_path, 4)


@pytest.mark.parametrize("info", [None, "]", "1"])
def test_a_file_that_is_no_shard(tmp_path: Path, info: str | None) -> None:
    path = tmp_path / "a.safetensors"
    metadata = None if info is None else {"DCP_SHARDING_INFO": info}
    save_file({"x": WEIGHT}, path, metadata=metadata)
    with pytest.raises(UserError, match=f"{path}: not a shard"):
        read_shards(tmp_path, 4)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=f"{path}: not a safetensors file"):
        read_shards(tmp_path, 4)
    path.unlink()
    with pytest.raises(UserError, match=f"{tmp_path}: no shards in it"):
        read_shards(tmp_path, 4)
