from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt2.errors import UserError
from fastgpt2.text import (
    BlockLoader,
    BytesTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    TokenShards,
    create_dataloader,
    create_shard,
    iter_eval_batches,
)
from fastgpt2.text.loaders import Tokens


def take(loader: BlockLoader, steps: int) -> torch.Tensor:
    """The inputs of some batches, one row a block."""
    return torch.cat([next(loader)[0] for _ in range(steps)])


def shards_of(path: Path, ids: np.ndarray[Any, Any]) -> TokenShards:
    with create_shard(path, BytesTokenizer()) as shard:
        shard.write(ids)
    return TokenShards([path])


def test_targets_are_the_inputs_moved_by_one() -> None:
    loader = BlockLoader(np.arange(100), block_size=7, batch_size=3)
    for _ in range(50):
        idx, targets = next(loader)
        assert idx.shape == targets.shape == (3, 7)
        assert idx.dtype == targets.dtype == torch.int64
        assert idx.is_contiguous() and targets.is_contiguous()
        assert torch.equal(targets, idx + 1)
        assert torch.equal(idx, idx[:, :1] + torch.arange(7))


@settings(max_examples=40)
@given(
    n=st.integers(2, 300),
    block_size=st.integers(1, 20),
    stride=st.integers(1, 25),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_with_a_stride_an_epoch_is_every_block_once(
    n: int, block_size: int, stride: int, batch_size: int, seed: int
) -> None:
    block_size = min(block_size, n - 1)
    loader = BlockLoader(
        np.arange(n), block_size=block_size, batch_size=batch_size, seed=seed, stride=stride
    )
    # as the book's sliding window counts them
    blocks = len(range(0, n - block_size, stride))
    assert loader.blocks_per_epoch == blocks
    assert loader.tokens_per_epoch == blocks * block_size
    rows = take(loader, 3 * blocks)[:, 0].reshape(-1, blocks)
    for epoch in rows[: 3 * batch_size]:
        assert sorted(epoch.tolist()) == [i * stride for i in range(blocks)]


@settings(max_examples=40)
@given(n=st.integers(2, 300), block_size=st.integers(1, 20), seed=st.integers(0, 9))
def test_with_phase_blocks_stay_inside_and_hardly_overlap(
    n: int, block_size: int, seed: int
) -> None:
    block_size = min(block_size, n - 1)
    loader = BlockLoader(np.arange(n), block_size=block_size, batch_size=1, seed=seed)
    for _ in range(3):
        starts = sorted(take(loader, loader.steps_per_epoch)[:, 0].tolist())
        assert starts[0] < block_size and starts[-1] + block_size <= n - 1
        steps = [b - a for a, b in pairwise(starts)]
        assert all(step == block_size for step in steps[:-1])
        assert all(0 < step <= block_size for step in steps[-1:])


def test_epochs_differ_in_order_and_borders() -> None:
    loader = BlockLoader(np.arange(1001), block_size=10, batch_size=100)
    first, second = take(loader, 1)[:, 0], take(loader, 1)[:, 0]
    assert not torch.equal(first, second)
    assert not torch.equal(first.sort().values, second.sort().values)
    assert not torch.equal(first, first.sort().values)


def test_seed_decides_the_stream() -> None:
    def stream(seed: int) -> torch.Tensor:
        return take(BlockLoader(np.arange(500), block_size=10, batch_size=4, seed=seed), 30)

    assert torch.equal(stream(1), stream(1))
    assert not torch.equal(stream(1), stream(2))


@pytest.mark.parametrize("steps", [0, 1, 5, 33])
def test_resume_is_exact(steps: int) -> None:
    def fresh() -> BlockLoader:
        return BlockLoader(np.arange(200), block_size=9, batch_size=4, seed=3)

    loader, resumed = fresh(), fresh()
    for _ in range(steps):
        next(loader)
    resumed.load_state_dict(loader.state_dict())
    for _ in range(40):
        for ours, theirs in zip(next(resumed), next(loader), strict=True):
            assert torch.equal(ours, theirs)


def test_resume_with_another_batch_size_goes_on_in_the_same_order() -> None:
    def fresh(batch_size: int) -> BlockLoader:
        return BlockLoader(np.arange(200), block_size=9, batch_size=batch_size)

    whole = take(fresh(1), 60)
    loader = fresh(6)
    before = take(loader, 5)
    other = fresh(3)
    other.load_state_dict(loader.state_dict())
    assert torch.equal(torch.cat([before, take(other, 10)]), whole)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_stream(world_size: int) -> None:
    def fresh(batch_size: int, rank: int = 0, world_size: int = 1) -> BlockLoader:
        return BlockLoader(
            np.arange(200), block_size=9, batch_size=batch_size, rank=rank, world_size=world_size
        )

    one = fresh(4 * world_size)
    several = [fresh(4, rank, world_size) for rank in range(world_size)]
    for _ in range(20):
        assert torch.equal(next(one)[0], torch.cat([next(loader)[0] for loader in several]))
    assert len({loader.state_dict()["position"] for loader in [one, *several]}) == 1
    assert one.steps_per_epoch == several[0].steps_per_epoch


def test_numbers_of_an_epoch() -> None:
    loader = BlockLoader(np.arange(101), block_size=10, batch_size=4)
    assert (loader.tokens_per_epoch, loader.steps_per_epoch) == (100, 3)
    assert loader.epoch == 0
    take(loader, 5)
    assert loader.epoch == 2.0


@pytest.mark.parametrize("change", [{"seed": 1}, {"block_size": 8}, {"n": 201}])
def test_resume_on_something_else_is_refused(change: dict[str, int]) -> None:
    def fresh(n: int = 200, block_size: int = 9, seed: int = 0) -> BlockLoader:
        return BlockLoader(np.arange(n), block_size=block_size, batch_size=4, seed=seed)

    with pytest.raises(UserError, match=r"resume: the data stream was saved with \w+ \d+, now"):
        fresh(**change).load_state_dict(fresh().state_dict())


def test_every_kind_of_tokens_gives_the_same_batches(tmp_path: Path) -> None:
    ids = np.arange(200)
    kinds: list[Tokens] = [
        ids,
        ids.astype(np.uint16),
        torch.from_numpy(ids),
        ids.tolist(),
        shards_of(tmp_path / "a", ids),
    ]
    streams = [take(BlockLoader(kind, block_size=9, batch_size=4), 9) for kind in kinds]
    assert all(torch.equal(stream, streams[0]) for stream in streams)
    evals = [torch.cat([y for _, y in iter_eval_batches(kind, 9, 4)]) for kind in kinds]
    assert all(torch.equal(targets, evals[0]) for targets in evals)


def test_corpus_shorter_than_a_block() -> None:
    with pytest.raises(UserError, match=r"a\.txt: too short: 64 tokens, at least 65 are needed"):
        BlockLoader(np.arange(64), block_size=64, batch_size=1, name="a.txt")
    assert BlockLoader(np.arange(65), block_size=64, batch_size=1).blocks_per_epoch == 1


@pytest.mark.parametrize("bad", [65, -1])
def test_id_outside_the_vocabulary(bad: int) -> None:
    ids = np.arange(50)
    ids[7] = bad
    message = f"a.txt: id {bad} at position 7 is not in the vocabulary of 65"
    with pytest.raises(UserError, match=message):
        BlockLoader(ids, block_size=4, batch_size=1, vocab_size=65, name="a.txt")
    with pytest.raises(UserError, match=message):
        iter_eval_batches(ids, 4, 1, vocab_size=65, name="a.txt")


def test_shards_of_a_larger_vocabulary(tmp_path: Path) -> None:
    shards = shards_of(tmp_path / "a", np.arange(50))
    with pytest.raises(UserError, match="a vocabulary of 257 for a model of 65"):
        BlockLoader(shards, block_size=4, batch_size=1, vocab_size=65)


def test_tokens_are_one_dimensional() -> None:
    with pytest.raises(UserError, match=r"one dimension, got shape \(2, 3\)"):
        BlockLoader(np.zeros((2, 3), np.int64), block_size=1, batch_size=1)


@pytest.mark.parametrize("wrong", [{"block_size": 0}, {"batch_size": 0}, {"rank": 1}, {"rank": -1}])
def test_wrong_arguments(wrong: dict[str, int]) -> None:
    arguments: dict[str, Any] = {"block_size": 2, "batch_size": 1} | wrong
    with pytest.raises(ValueError, match="BlockLoader: needs"):
        BlockLoader(np.arange(9), **arguments)


@given(n=st.integers(2, 200), block_size=st.integers(1, 20), batch_size=st.integers(1, 9))
def test_evaluation_covers_every_token_once_in_order(
    n: int, block_size: int, batch_size: int
) -> None:
    batches = list(iter_eval_batches(np.arange(n), block_size, batch_size))
    assert len({idx.shape for idx, _ in batches}) == 1
    assert batches[0][0].shape[0] <= batch_size and batches[0][0].shape[1] == block_size
    idx = torch.cat([idx for idx, _ in batches])
    targets = torch.cat([targets for _, targets in batches])
    kept = targets != -100
    assert targets[kept].tolist() == list(range(1, n))
    assert torch.equal(idx[kept], targets[kept] - 1)
    assert (idx[~kept] == 0).all()
    # only one batch, the last, has anything to ignore
    assert all((targets != -100).all() for _, targets in batches[:-1])
    assert (batches[-1][1] != -100).any()


@given(n=st.integers(2, 90), batch_size=st.integers(1, 4), world_size=st.integers(1, 4))
def test_evaluation_is_dealt_out_to_ranks(n: int, batch_size: int, world_size: int) -> None:
    shares = [
        list(iter_eval_batches(np.arange(n), 5, batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    # each waits for the others after each batch
    assert len({len(share) for share in shares}) == 1
    targets = [batch[1] for batches in zip(*shares, strict=True) for batch in batches]
    assert [int(x) for batch in targets for x in batch[batch != -100]] == list(range(1, n))


def test_evaluation_needs_two_tokens_before_the_first_batch() -> None:
    with pytest.raises(UserError, match="validation tokens: too short: 1 tokens"):
        iter_eval_batches(np.arange(1), 8, 2)


def windows(*args: Any, **kwargs: Any) -> list[list[int]]:
    batches = create_dataloader(*args, **kwargs)
    return [row for idx, _ in batches for row in idx.tolist()]


def test_sliding_window() -> None:
    rows = windows(np.arange(10), 2, 4, 2, shuffle=False, drop_last=False)
    assert rows == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
    assert windows(np.arange(10), 2, 4, 2, shuffle=False) == rows[:2]
    assert windows(np.arange(11), 2, 4, 2, False, False) == [*rows, [6, 7, 8, 9]]
    assert windows(np.arange(9), 1, 8, 8, False) == [list(range(8))]


@given(n=st.integers(2, 60), max_length=st.integers(1, 9), stride=st.integers(1, 9))
def test_windows_are_those_of_the_book(n: int, max_length: int, stride: int) -> None:
    max_length = min(max_length, n - 1)
    ids = list(range(n))
    # chapter 2: one window at each of range(0, len(ids) - max_length, stride)
    starts = range(0, n - max_length, stride)
    loader = create_dataloader(np.arange(n), 3, max_length, stride, False, False)
    pairs = [
        (x, y)
        for idx, targets in loader
        for x, y in zip(idx.tolist(), targets.tolist(), strict=True)
    ]
    assert pairs == [(ids[i : i + max_length], ids[i + 1 : i + max_length + 1]) for i in starts]


def test_shuffling_is_by_torchs_generator() -> None:
    ordered = windows(np.arange(100), 4, 4, 4, shuffle=False)
    torch.manual_seed(0)
    first = windows(np.arange(100), 4, 4, 4)
    torch.manual_seed(0)
    assert windows(np.arange(100), 4, 4, 4) == first
    assert first != ordered and sorted(first) == ordered


def test_text_needs_only_a_tokenizer() -> None:
    idx, targets = next(
        iter(create_dataloader("abcdefgh", 1, 4, 1, False, tokenizer=CharTokenizer("abcdefgh")))
    )
    assert (idx.dtype, idx.tolist(), targets.tolist()) == (
        torch.int64,
        [[0, 1, 2, 3]],
        [[1, 2, 3, 4]],
    )


def test_text_is_encoded_by_gpt2_by_default(
    tiny_gpt2: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgpt2.text.loaders.get_tokenizer", {"gpt2": tiny_gpt2}.__getitem__)
    assert windows("the and the", 1, 2, 1, False) == [tiny_gpt2.encode("the and")]


def test_windows_of_shards_in_worker_processes(tmp_path: Path) -> None:
    shards = shards_of(tmp_path / "a", np.arange(100))
    assert windows(shards, 4, 4, 4, False, num_workers=2) == windows(np.arange(100), 4, 4, 4, False)


def test_too_short_for_a_window_or_a_batch() -> None:
    with pytest.raises(UserError, match="create_dataloader: too short: 4 tokens, at least 5"):
        create_dataloader(np.arange(4), 1, 4, 1)
    with pytest.raises(UserError, match="make 2 windows, fewer than one batch of 3"):
        create_dataloader(np.arange(6), 3, 4, 1)
    with pytest.raises(ValueError, match="must be positive"):
        create_dataloader(np.arange(6), 3, 4, 0)
