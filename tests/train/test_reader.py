"""Batches are read while the device computes, and the position is that of the batches taken."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt2 import runs
from fastgpt2.peers import READER
from fastgpt2.prepare import prepare
from fastgpt2.text.loaders import Batch, BlockLoader, BlockStream
from fastgpt2.text.shards import HEADER_BYTES
from fastgpt2.train.__main__ import main
from fastgpt2.train.reader import Reader
from fastgpt2.train.step import TrainingStep

CPU = torch.device("cpu")
PATIENCE = 60.0


def stream(**options: Any) -> BlockLoader:
    defaults: dict[str, Any] = dict(block_size=4, batch_size=2, seed=3)
    return BlockLoader(np.arange(200), **(defaults | options))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for (idx, targets), (other_idx, other_targets) in zip(ours, theirs, strict=True):
        assert torch.equal(idx, other_idx) and torch.equal(targets, other_targets)


def test_batches_and_position_are_those_of_the_stream() -> None:
    plain, read = stream(rank=1, world_size=2), stream(rank=1, world_size=2)
    with Reader(read, CPU, ahead=3) as reader:
        for _ in range(5):
            assert_same(reader.take(2), [next(plain) for _ in range(2)])
            assert read.state_dict() == plain.state_dict()


def test_a_position_that_is_moved_is_followed() -> None:
    plain, read = stream(), stream()
    with Reader(read, CPU, ahead=3) as reader:
        begin = read.state_dict()
        first = reader.take(4)
        read.load_state_dict(begin)
        assert_same(reader.take(4), first)
        plain.load_state_dict(begin | {"position": 34})
        read.load_state_dict(begin | {"position": 34})
        assert_same(reader.take(2), [next(plain) for _ in range(2)])


def watched(read: BlockStream, look: Callable[[int], None]) -> BlockStream:
    whole = read.batch_at

    def batch_at(place: int) -> Batch:
        look(place)
        return whole(place)

    read.batch_at = batch_at  # type: ignore[method-assign]
    return read


def test_reading_overlaps_computing() -> None:
    """A step that ends only after the next batch has been read, and one that none reads past."""
    reached = {place: threading.Event() for place in range(0, 20, 2)}
    read = watched(stream(), lambda place: reached[place].set())
    with Reader(read, CPU, ahead=2) as reader:
        for place in (0, 2, 4):
            reader.take(1)
            # the step is computed here
            assert reached[place + 4].wait(PATIENCE)
            assert not reached[place + 6].is_set()


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    yield
    assert READER not in [thread.name for thread in threading.enumerate()]


@pytest.mark.usefixtures("no_thread_left")
def test_an_error_comes_in_its_place_and_may_pass() -> None:
    broken = True

    def fail(place: int) -> None:
        if broken and place == 4:
            raise OSError(5, "Input/output error", "tokens.bin")

    read = watched(stream(), fail)
    with Reader(read, CPU, ahead=4) as reader:
        first = reader.take(2)
        with pytest.raises(OSError, match="Input/output error"):
            reader.take(1)
        assert read.blocks_used == 4
        broken = False
        assert len(reader.take(2)) == 2
        assert len(first) == 2


@pytest.mark.usefixtures("no_thread_left", "no_picture")
def test_a_run_says_it_in_one_line_and_saves(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = BlockLoader.blocks

    def blocks(self: BlockLoader, first: int, count: int) -> Any:
        if first >= 6:
            raise OSError(5, "Input/output error", "tokens.bin")
        return whole(self, first, count)

    monkeypatch.setattr(BlockLoader, "blocks", blocks)
    shape = "--tokenizer=bytes --model=gpt2-nano --block-size=8 --n-layer=1 --n-head=1 --n-embd=8"
    flags = [*shape.split(), "--batch-size=2", "--steps=9", "--sample-tokens=0", "--device=cpu"]
    assert main(["--data", str(data), "--out", str(tmp_path / "run"), *flags]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert errors == ["fastgpt2 train: error: tokens.bin: Input/output error"]
    # the batches taken count, not those read ahead
    state = runs.read_state(runs.latest(tmp_path / "run"))
    assert (state["step"], state["loader"]["position"]) == (3, 6)


@pytest.mark.usefixtures("no_thread_left", "no_picture")
def test_tokens_that_become_shorter_end_a_run_that_is_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare([str(data)], tmp_path / "tokens", tokenizer="bytes")
    whole, steps = TrainingStep.__call__, 0

    def call(self: TrainingStep, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            for file in (tmp_path / "tokens").glob("*.tokens"):
                with file.open("rb+") as opened:
                    opened.truncate(HEADER_BYTES)
        return whole(self, *arguments)

    monkeypatch.setattr(TrainingStep, "__call__", call)
    shape = "--model=gpt2-nano --block-size=8 --n-layer=1 --n-head=1 --n-embd=8"
    flags = [*shape.split(), "--batch-size=2", "--steps=99", "--sample-tokens=0", "--device=cpu"]
    run = tmp_path / "run"
    assert main(["--data", str(tmp_path / "tokens"), "--out", str(run), *flags]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and "became shorter while it was in use" in errors[0]
    # the batch of one more step had been read
    assert runs.saved_steps(run)[-1] in (4, 5)
