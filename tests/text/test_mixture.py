"""Mixtures: what a weight is, which source gives which block, and that nothing depends on ranks."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgpt2.errors import UserError
from fastgpt2.prepare import prepare
from fastgpt2.text import build_dataset
from fastgpt2.text.mixture import Mixture, absolute_item, item_paths, split_weight, split_weights
from fastgpt2.text.mixture_loader import _RANGE, _STEP, MixtureLoader, mixture_lines
from fastgpt2.text.stored import JoinedTokens
from tests.text.other_programs import write_llmc

# ids of each source tell where a block comes from
SOURCES = tuple(np.arange(size, dtype=np.uint16) + start for size, start in ((70, 0), (200, 1000)))


def loader(**options: Any) -> MixtureLoader:
    mixture = Mixture(SOURCES, ("a", "b"), (0.3, 0.7))
    return MixtureLoader(mixture, **(dict[str, Any](block_size=8, batch_size=4, seed=5) | options))


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("a.txt:0.3", ("a.txt", 0.3)),
        ("b/:7", ("b/", 7.0)),
        ("c/*.txt:1e-2", ("c/*.txt", 0.01)),
        ("python-docs:2", ("python-docs", 2.0)),
        (r"C:\texts\a.txt", (r"C:\texts\a.txt", None)),
        (r"C:\texts\a.txt:0.5", (r"C:\texts\a.txt", 0.5)),
        ("C:/texts", ("C:/texts", None)),
        ("a.txt", ("a.txt", None)),
        ("a.txt:", ("a.txt:", None)),
        (":0.3", (":0.3", None)),
        ("a:b", ("a:b", None)),
    ],
)
def test_what_a_weight_is(
    item: str, expected: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_weight(item) == expected


def test_a_name_that_is_there_has_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("log:1", "log:2"):
        (tmp_path / name).write_text("text", encoding="utf-8")
    assert split_weight("log:1") == ("log:1", None)
    assert split_weight("l*:2") == ("l*:2", None)
    assert split_weight("log:1:2") == ("log:1", 2.0)
    assert split_weight("log:3") == ("log", 3.0)
    assert absolute_item("log:1:0.50") == f"{tmp_path / 'log:1'}:0.50"
    assert absolute_item("log:1") == str(tmp_path / "log:1")
    assert item_paths("log:1:2") == [Path("log:1")]


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "-0.0"])
def test_weights_are_positive_numbers(weight: str) -> None:
    with pytest.raises(UserError, match=f"data: a:{weight}: the weight must be a positive number"):
        split_weights([f"a:{weight}", "b:1"])


def test_weights_are_scaled_and_of_all_or_none() -> None:
    assert split_weights(["a:1", "b:3"]) == (["a", "b"], [0.25, 0.75])
    assert split_weights(["a", "b"]) is None
    with pytest.raises(UserError, match="data: b has no weight; give one to all"):
        split_weights(["a:1", "b"])
    # the sum is beyond the largest number, or one share below the smallest
    for weights in (("1e308", "1e308"), ("1e-200", "1e200")):
        with pytest.raises(UserError, match="data: the weights are too far apart, or too large"):
            split_weights([f"a:{weights[0]}", f"b:{weights[1]}"])


def test_counts_are_those_of_the_stream() -> None:
    mixed = loader()
    chosen = mixed._sources_at(0, 5000)
    for place in (0, 1, 2, 17, 1000, 4999):
        assert mixed.blocks_of(place) == [int((chosen[:place] == n).sum()) for n in (0, 1)]
    # every stretch has its share, to within a few blocks
    for start in range(0, 4900, 100):
        assert abs(int((chosen[start : start + 100] == 0).sum()) - 30) <= 3
    far = 10**12
    assert abs(mixed.blocks_of(far)[0] - 0.3 * far) < 0.001 * far
    assert sum(mixed.blocks_of(far)) == far
    assert (loader(seed=6)._sources_at(0, 5000) != chosen).any()


@pytest.mark.parametrize("above", [0, 1])
def test_counts_are_exact_where_a_share_ends_at_a_drawn_number(above: int) -> None:
    mixed = loader()
    drawn = (mixed._offset + _STEP * 7) % _RANGE
    mixed._ends = [drawn + above, _RANGE]
    chosen = mixed._sources_at(0, 50)
    assert chosen[7] == 1 - above
    for place in range(50):
        assert mixed.blocks_of(place)[0] == int((chosen[:place] == 0).sum())


def test_each_source_gives_each_of_its_blocks_once_an_epoch() -> None:
    mixed = loader()
    blocks = mixed.blocks(0, 400)
    mine = blocks[blocks[:, 0] < 1000]
    source = mixed.sources[0]
    assert np.array_equal(mine, source.blocks(0, len(mine)))
    assert source.blocks_per_epoch == 8
    # blocks of T apart: in one epoch no start comes twice
    starts = mine[: source.blocks_per_epoch, 0]
    assert len(set(starts.tolist())) == len(starts)
    assert mixed.blocks_per_epoch == 8 + 24
    lines = mixture_lines(mixed, 400)
    assert lines[0] == f"mixture: a: 30.0% of the blocks, {len(mine) / 8:.3g} epochs of it"
    assert mixture_lines(source, 400) == []


def test_ranks_share_one_stream_and_resuming_is_exact() -> None:
    whole = np.concatenate([np.asarray(next(single)[0]) for single in [loader()] for _ in range(6)])
    ranks = [loader(batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    shared = np.concatenate([np.asarray(next(rank)[0]) for _ in range(6) for rank in ranks])
    assert np.array_equal(whole, shared)
    first = loader()
    for _ in range(3):
        next(first)
    # resumed with another batch size
    second = loader(batch_size=12)
    second.load_state_dict(first.state_dict())
    assert np.array_equal(np.asarray(next(second)[0]), whole[12:24])


def test_a_state_is_of_its_weights() -> None:
    other = MixtureLoader(Mixture(SOURCES, ("a", "b"), (0.5, 0.5)), block_size=8, batch_size=4)
    with pytest.raises(UserError, match="resume: the data stream was saved with"):
        other.load_state_dict(loader(seed=0).state_dict())


def test_joined_tokens_are_one_sequence() -> None:
    joined = JoinedTokens(SOURCES)
    whole = np.concatenate(SOURCES)
    assert len(joined) == 270
    for start, stop in ((0, 270), (60, 80), (69, 70), (70, 71), (-5, None), (8, 3)):
        assert np.array_equal(joined[start:stop], whole[start:stop])
    assert joined[:].dtype == np.uint16


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    paths = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path, text in zip(paths, ("aaaa\n" * 50, "bbbb\n" * 100), strict=True):
        path.write_text(text, encoding="utf-8")
    return [str(path) for path in paths]


def test_text_shards_and_token_files_mix(texts: list[str], tmp_path: Path) -> None:
    prepare([texts[1]], tmp_path / "shards", tokenizer="bytes")
    llmc = write_llmc(tmp_path / "c_train.bin", [99] * 40)
    items = [f"{texts[0]}:1", f"{tmp_path / 'shards'}:2", f"{llmc}:1"]
    data = build_dataset(items)
    assert isinstance(data.train, Mixture) and data.val is not None
    assert data.tokenizer.name == "bytes"
    assert data.train.weights == (0.25, 0.5, 0.25)
    first = data.train.tokens[0]
    # the text's last document ends, too
    assert first[:].tolist() == [*(b"aaaa\n" * 45), 256]
    # and so do the documents of shards and token files
    val = [*(b"aaaa\n" * 5), 256, *(b"bbbb\n" * 10), 256, *[99] * 4, 256]
    assert data.val[:].tolist() == val
    assert data.train.tokens[2][:].tolist() == [99] * 36 + [256]
    assert f"{texts[0]} (25.0%)" in data.source


def test_characters_are_those_of_all_sources(texts: list[str]) -> None:
    data = build_dataset([f"{texts[0]}:1", f"{texts[1]}:1"], "char")
    assert data.tokenizer.vocab_size == 3


def test_the_digest_is_of_tokens_and_weights(texts: list[str]) -> None:
    digests = {
        build_dataset([f"{texts[0]}:{a}", f"{texts[1]}:{b}"], "bytes").digest
        for a, b in ((1, 1), (2, 2), (1, 2))
    }
    assert len(digests) == 2
    with pytest.raises(UserError, match=r"weights .NAME:WEIGHT. are for training; prepare takes"):
        prepare([f"{texts[0]}:1"], "never")


def test_a_source_that_is_too_short_is_named() -> None:
    mixture = Mixture((SOURCES[0], SOURCES[1][:5]), ("a", "b"), (0.5, 0.5))
    with pytest.raises(UserError, match="training tokens of b: too short: 5 tokens"):
        MixtureLoader(mixture, block_size=8, batch_size=1)


def test_a_pipe_is_refused_in_plain_words(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.txt").write_text("some text\n" * 20, encoding="utf-8")
    items = [f"{tmp_path / name}:1" for name in ("a.txt", "pipe")]
    with pytest.raises(UserError, match=r"pipe can be read only once; write it to a file to mix"):
        build_dataset(items, "bytes")


def test_a_source_is_named_once(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for other in (texts[0], "a.txt", "./a.txt"):
        with pytest.raises(UserError, match=r"a.txt is in the mixture twice; give it once, with"):
            build_dataset([f"{texts[0]}:1", f"{texts[1]}:1", f"{other}:2"], "bytes")
    with pytest.raises(UserError, match="python-docs is in the mixture twice"):
        build_dataset(["python-docs:1", "python-docs:2"], "bytes")


def test_a_file_in_two_sources_is_said(texts: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    items = [f"{tmp_path}:1", f"{texts[1]}:1"]
    build_dataset(items, "bytes", notify=said.append)
    assert f"data: {texts[1]} is in {tmp_path} and in {texts[1]}: text that validates" in said[0]
    said.clear()
    build_dataset([f"{path}:1" for path in texts], "bytes", notify=said.append)
    assert said == []


def test_a_mixture_of_texts_takes_no_number_of_ids(texts: list[str]) -> None:
    with pytest.raises(UserError, match="--vocab-size 99: is for token files, and the data are"):
        build_dataset([f"{path}:1" for path in texts], "bytes", vocab_size=99)
