import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt2.errors import FileChangedError, UserError
from fastgpt2.text import BytesTokenizer, CharTokenizer, Tokenizer, TokenShards, create_shard
from fastgpt2.text.shards import HEADER_BYTES, ShardHeader


class AnyVocabulary(BytesTokenizer):
    """A tokenizer of any size; the shards ask for nothing more of it."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size


def write(path: Path, ids: Any, tokenizer: Tokenizer | None = None) -> Path:
    with create_shard(path, tokenizer or BytesTokenizer()) as shard:
        shard.write(ids)
    return path


def edit(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65536, 2), (65537, 4), (50257, 2)])
def test_round_trip_with_the_smaller_dtype(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    ids = [0, 1, vocab_size - 1, 50256, 7]
    path = write(tmp_path / "a.tokens", ids, AnyVocabulary(vocab_size))
    assert path.stat().st_size == HEADER_BYTES + itemsize * 5
    shards = TokenShards([path])
    assert shards[:].tolist() == ids
    assert shards.dtype.itemsize == itemsize
    assert (shards.vocab_size, shards.tokenizer) == (vocab_size, "bytes")
    shards.verify()


def test_header_is_what_the_format_says(tmp_path: Path) -> None:
    data = write(tmp_path / "a.tokens", [1, 2, 3]).read_bytes()
    assert data[:8] == b"FGPT2TOK"
    assert data[8:16] == bytes([1, 0, 0, 0, 2, 0, 0, 0])
    assert data[16:32] == bytes([1, 1] + [0] * 6 + [3] + [0] * 7)
    assert data[64:69] == b"bytes"
    assert data[96:112].decode() == BytesTokenizer().fingerprint
    assert data[256:] == bytes([1, 0, 2, 0, 3, 0])


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    start=st.integers(-70, 70) | st.none(),
    stop=st.integers(-70, 70) | st.none(),
)
def test_several_shards_are_one_sequence(
    sizes: list[int], start: int | None, stop: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    ids = np.random.default_rng(0).integers(0, 257, sum(sizes))
    parts = np.split(ids, np.cumsum(sizes)[:-1])
    paths = [write(folder / f"{i}.tokens", part) for i, part in enumerate(parts)]
    shards = TokenShards(paths)
    assert len(shards) == len(ids)
    assert shards[start:stop].tolist() == ids[start:stop].tolist()
    shards.verify()
    shards.close()


def test_slices_have_step_one(tmp_path: Path) -> None:
    shards = TokenShards([write(tmp_path / "a", range(9))])
    with pytest.raises(ValueError, match="step 1, got 2"):
        shards[::2]


def test_shards_go_to_another_process(tmp_path: Path) -> None:
    shards = TokenShards([write(tmp_path / "a", range(9))])
    assert pickle.loads(pickle.dumps(shards))[2:4].tolist() == [2, 3]


@pytest.mark.parametrize("ids", [[1, 2, 257], [-1], np.array([2**16 + 5])])
def test_id_outside_the_vocabulary_is_not_written(tmp_path: Path, ids: Any) -> None:
    with pytest.raises(UserError, match=r"id -?\d+ at position \d is not in the vocabulary of 257"):
        write(tmp_path / "a", ids)
    assert list(tmp_path.iterdir()) == []


def test_no_id_wraps_around(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="uint16 cannot hold the vocabulary of 65537, uint32 can"),
        create_shard(tmp_path / "a", AnyVocabulary(65537), dtype=np.dtype("uint16")),
    ):
        pass
    with create_shard(tmp_path / "a", AnyVocabulary(257), dtype=np.dtype("uint32")) as shard:
        shard.write([256])
    assert TokenShards([tmp_path / "a"])[:].tolist() == [256]


@pytest.mark.parametrize("dtype", ["int16", "float32", "uint8", "uint64"])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: str) -> None:
    with (
        pytest.raises(UserError, match="cannot hold"),
        create_shard(tmp_path / "a", BytesTokenizer(), dtype=np.dtype(dtype)),
    ):
        pass


def test_ids_must_be_integers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ids must be integers, got float64"):
        write(tmp_path / "a", [1.5])


def test_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        create_shard(tmp_path / "a", BytesTokenizer()) as shard,
    ):
        shard.write([1])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"NOTSHARD", "expected magic b'FGPT2TOK', got b'NOTSHARD'"),
        (8, b"\2", "expected version 1, got 2"),
        (12, b"\4", "the header is damaged"),
        (24, b"\1", "the header is damaged"),
        (100, b"x", "the header is damaged"),
    ],
)
def test_damaged_header(tmp_path: Path, offset: int, data: bytes, message: str) -> None:
    path = write(tmp_path / "a.tokens", range(9))
    edit(path, offset, data)
    with pytest.raises(UserError, match=rf"a\.tokens: {message}"):
        TokenShards([path])


def test_dtype_too_small_for_the_vocabulary(tmp_path: Path) -> None:
    header = ShardHeader(2, 65537, 0, bytes(32), "bytes", "0")
    (tmp_path / "a").write_bytes(header.pack())
    with pytest.raises(UserError, match="2 bytes per id cannot hold a vocabulary of 65537"):
        TokenShards([tmp_path / "a"])


@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_size(tmp_path: Path, change: int) -> None:
    path = write(tmp_path / "a", range(9))
    data = path.read_bytes()
    path.write_bytes(data[:-1] if change < 0 else data + b"x")
    with pytest.raises(
        UserError, match=f"9 ids of 2 bytes make 274 bytes, the file has {274 + change}"
    ):
        TokenShards([path])


@pytest.mark.parametrize("size", [0, 5, 100])
def test_too_short_for_a_header(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "a", range(9))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="magic" if size < 8 else "header has 100 of 256 bytes"):
        TokenShards([path])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        TokenShards([tmp_path / "none"])
    with pytest.raises(UserError, match="no files given"):
        TokenShards([])


def test_changed_ids_are_found_by_the_checksum(tmp_path: Path) -> None:
    path = write(tmp_path / "a", range(200))
    edit(path, HEADER_BYTES + 20, b"\7")
    shards = TokenShards([path])
    with pytest.raises(UserError, match=r"expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}"):
        shards.verify()


def test_an_id_beyond_the_vocabulary_never_leaves_the_reader(tmp_path: Path) -> None:
    path = write(tmp_path / "a", range(200))
    edit(path, HEADER_BYTES + 20, b"\xff\xff")
    shards = TokenShards([path])
    assert shards[:10].tolist() == list(range(10))
    with pytest.raises(UserError, match="a: id 65535 at position 10 is not in"):
        shards[5:15]


def test_file_that_shrinks_while_in_use(tmp_path: Path) -> None:
    path = write(tmp_path / "a", range(200))
    shards = TokenShards([path])
    with path.open("rb+") as file:
        file.truncate(300)
    with pytest.raises(FileChangedError, match="became shorter"):
        shards[:]


def test_shards_of_different_tokenizers_do_not_mix(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a", [1], CharTokenizer("abc")),
        write(tmp_path / "b", [1], CharTokenizer("abd")),
    ]
    with pytest.raises(UserError, match=r"b: tokenizer char .* but .*a has char"):
        TokenShards(paths)


READ_ALL = """
import sys
import numpy as np
from fastgpt2.text.shards import TokenShards

def peak():
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

shards = TokenShards(sys.argv[1:])
total = shards[:1024].sum()
before = peak()
starts = np.random.default_rng(0).permutation(len(shards) // 1024) * 1024
for start in starts.tolist():
    total += shards[start : start + 1024].sum()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_reading_200_mb_keeps_memory_bounded(tmp_path: Path) -> None:
    ids = np.tile(np.arange(257, dtype=np.uint16), 20_000)
    paths = []
    for i in range(2):
        with create_shard(tmp_path / f"{i}", BytesTokenizer()) as shard:
            for _ in range(10):
                shard.write(ids)
        paths.append(str(shard_path := tmp_path / f"{i}"))
        assert shard_path.stat().st_size > 100_000_000
    result = subprocess.run(
        [sys.executable, "-c", READ_ALL, *paths], capture_output=True, text=True, check=True
    )
    # kilobytes; a memory map would end at 200,000
    assert int(result.stdout) < 10_000
