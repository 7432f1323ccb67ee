"""The bundle reader and writer against TensorFlow itself, which runs in another process."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt2.errors import UserError
from fastgpt2.weights.sstable import MAX_ENTRIES, read_table, write_table
from fastgpt2.weights.tensors import LazyTensor
from fastgpt2.weights.tf_bundle import Bundle, write_bundle
from tests.weights.conftest import GOLDEN

SCRIPT = Path(__file__).with_name("tensorflow_script.py")
# a Python with TensorFlow, if it is not this one
TF_PYTHON = os.environ.get("FASTGPT2_TF_PYTHON") or (
    sys.executable if find_spec("tensorflow") else None
)

OURS = {
    "a/float32": torch.randn(3, 4, generator=torch.Generator().manual_seed(1)),
    "a/float16": torch.linspace(-2, 2, 5, dtype=torch.float16),
    "a/int64": torch.tensor(-7),
    "b": torch.zeros(0, 3),
    "b/bool": torch.tensor([True, False, True]),
    "b/int32": torch.arange(6, dtype=torch.int32).reshape(1, 2, 3),
    # more entries than one restart interval
    **{f"c/{i}": torch.full((i,), float(i)) for i in range(40)},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with checkpoints that TensorFlow wrote, and with what it read from ours."""
    if TF_PYTHON is None:
        pytest.skip(
            "TensorFlow is not installed (FASTGPT2_TF_PYTHON may name a Python that has it)"
        )
    folder = tmp_path_factory.mktemp("tensorflow")
    ours = tmp_path_factory.mktemp("ours") / "model.ckpt"
    write_bundle(ours, {name: LazyTensor.of(tensor) for name, tensor in OURS.items()})
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    command = [TF_PYTHON, str(SCRIPT), str(folder), str(ours)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["dtypes", "shards", "blocks", "saver", "objects"])
def test_reads_what_tensorflow_wrote(written: Path, name: str) -> None:
    with np.load(written / "expected.npz") as file:
        expected = {
            key.removeprefix(f"{name}|"): file[key] for key in file if key.startswith(f"{name}|")
        }
    bundle = Bundle(written / name)
    unread = set(bundle.entries) - set(expected)
    assert all("_CHECKPOINTABLE" in key or "save_counter" in key for key in unread)
    assert expected
    for key, value in expected.items():
        lazy = bundle.tensor(key)
        tensor = lazy.read()
        assert lazy.shape == tuple(tensor.shape) == value.shape
        assert lazy.dtype == tensor.dtype
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.view(torch.uint16)
        assert tensor.numpy().dtype == value.dtype
        np.testing.assert_array_equal(tensor.numpy(), value)


def test_shards_and_blocks_are_several(written: Path) -> None:
    assert Bundle(written / "shards").shards == 3
    # TensorFlow begins a new block after 256 KiB
    assert (written / "blocks.index").stat().st_size > 1.2 * (256 << 10)


def test_tensorflow_reads_what_we_wrote(written: Path) -> None:
    with np.load(written / "ours.npz") as file:
        assert set(file) == set(OURS)
        for name, tensor in OURS.items():
            assert file[name].dtype == tensor.numpy().dtype
            np.testing.assert_array_equal(file[name], tensor.numpy())


def test_what_cannot_be_read_is_refused_by_name(written: Path) -> None:
    with pytest.raises(UserError, match=r"sliced\.index: 'w' is a partitioned variable"):
        Bundle(written / "sliced").tensor("w")
    with pytest.raises(UserError, match="'_CHECKPOINTABLE_OBJECT_GRAPH' has TensorFlow's type 7"):
        Bundle(written / "objects").tensor("_CHECKPOINTABLE_OBJECT_GRAPH")


def test_missing_shard_and_truncated_shard(written: Path, tmp_path: Path) -> None:
    for file in written.glob("shards.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "shards.data-00001-of-00003"
    shard.write_bytes(shard.read_bytes()[:-1])
    bundle = Bundle(tmp_path / "shards")
    bundle.tensor("part0/w0").read()
    with pytest.raises(UserError, match=r"data-00001-of-00003: truncated: 'part1/w2' needs bytes"):
        bundle.tensor("part1/w2")
    shard.unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00003: No such file .*'part1/w0'"):
        bundle.tensor("part1/w0")


def test_round_trip_of_every_dtype(tmp_path: Path) -> None:
    tensors = OURS | {"z/bfloat16": torch.linspace(-1, 1, 7, dtype=torch.bfloat16)}
    write_bundle(tmp_path / "x", {name: LazyTensor.of(t) for name, t in tensors.items()})
    bundle = Bundle(tmp_path / "x")
    assert sorted(bundle.entries) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(bundle.tensor(name).read(), tensor)


def test_reading_never_changes_the_file() -> None:
    lazy = Bundle(GOLDEN / "model.ckpt").tensor("model/wpe")
    first = lazy.read()
    kept = first.clone()
    first.zero_()
    assert torch.equal(lazy.read(), kept)


def test_wrong_crc_names_the_variable(openai_folder: Path) -> None:
    shard = openai_folder / "model.ckpt.data-00000-of-00001"
    data = bytearray(shard.read_bytes())
    bundle = Bundle(openai_folder / "model.ckpt")
    offset = bundle.entries["model/h1/ln_1/b"].offset
    data[offset + 17] ^= 1
    shard.write_bytes(data)
    bundle.tensor("model/h1/ln_1/g").read()
    with pytest.raises(UserError, match="values of 'model/h1/ln_1/b' have a wrong CRC-32C"):
        bundle.tensor("model/h1/ln_1/b").read()


def with_entry(name: str, change: Any) -> bytes:
    """The golden index with the record of one variable changed."""
    table = read_table((GOLDEN / "model.ckpt.index").read_bytes())
    table[name.encode()] = change(table[name.encode()])
    return write_table(table)


# of model/wpe: dtype 1, shape message of 9 bytes with dims 64 and 128, offset, size, crc
ROWS = b"\x12\x09\x12\x02\x08\x40"
HUGE = b"\x12\x11\x12\x0a\x08" + b"\x80" * 8 + b"\x40"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.replace(b"\x08\x40", b"\x08\x41"), "shape .65, 128. and type torch.float32"),
        (lambda r: b"\x08\x07" + r[2:], "has TensorFlow's type 7"),
        (lambda r: b"\x08\x13" + r[2:], "cannot take 32768 bytes"),
        # 2**62 rows: refused before anything of that size is made
        (lambda r: r.replace(ROWS, HUGE), "shape .4611686018427387904, 128. .* cannot take"),
        (lambda r: r + b"\x18\x03", "shard 3 of 1"),
        (lambda r: r + b"\x20\xff\xff\xff\xff\x7f", "truncated"),
        (lambda r: r + b"\x3a\x00", "partitioned"),
    ],
)
def test_forged_records(openai_folder: Path, change: Any, message: str) -> None:
    (openai_folder / "model.ckpt.index").write_bytes(with_entry("model/wpe", change))
    with pytest.raises(UserError, match=message) as error:
        Bundle(openai_folder / "model.ckpt").tensor("model/wpe")
    assert "'model/wpe'" in str(error.value)


def test_index_that_unfolds_to_more_than_it_may() -> None:
    table = {b"%06d" % i: b"" for i in range(MAX_ENTRIES + 1)}
    with pytest.raises(ValueError, match="more than 100000 entries"):
        read_table(write_table(table))
    with pytest.raises(ValueError, match="longer than 1024 bytes"):
        read_table(write_table({b"k" * 1025: b""}))


def test_compressed_index_is_refused() -> None:
    import struct

    from fastgpt2.weights.crc32c import crc32c, mask

    data = bytearray((GOLDEN / "model.ckpt.index").read_bytes())
    # the first block ends where its trailer (type, CRC) begins: 923 bytes, see the index block
    data[923] = 1
    data[924:928] = struct.pack("<I", mask(crc32c(bytes(data[:924]))))
    with pytest.raises(ValueError, match="snappy compression"):
        read_table(bytes(data))


def test_keys_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="out of order"):
        read_table(write_table({b"b": b"", b"a": b""}))
