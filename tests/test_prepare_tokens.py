"""``prepare --to``: what llm.c and nanoGPT read, and tokens of theirs brought back."""

import pickle
from pathlib import Path

import pytest

from fastgpt2.prepare import main, prepare
from fastgpt2.text import BytesTokenizer, build_dataset
from fastgpt2.text.prepared import open_prepared
from fastgpt2.text.token_formats import create_llmc
from tests.text.other_programs import read_uint16, write_llmc, write_meta, write_nanogpt

TEXT = "".join(f"the {i} and\n" for i in range(300))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for name, content in {"a.txt": "first\n", "b.txt": TEXT}.items():
        (tmp_path / "texts" / name).write_text(content, encoding="utf-8")
    return tmp_path / "texts"


def expected(text: Path) -> tuple[list[int], list[int]]:
    data = build_dataset(str(text), "bytes")
    assert data.val is not None
    return data.train[:].tolist(), data.val[:].tolist()


def test_to_llmc(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    args = ["--data", str(text), "--out", str(out), "--tokenizer", "bytes", "--workers", "1"]
    assert main([*args, "--to", "llmc", "--shard-tokens", "2000"]) == 0
    train, val = expected(text)
    names = ["train_000000.bin", "train_000001.bin", "val_000000.bin"]
    assert sorted(path.name for path in out.glob("*.bin")) == names
    ids = [read_uint16(out / name, 1024) for name in names]
    assert (ids[0] + ids[1], ids[2]) == (train, val)
    for name, part in zip(names, ids, strict=True):
        # the header, by int32: magic, version, count, zeros
        words = read_uint16(out / name)[:512]
        low_high = [words[i] | words[i + 1] << 16 for i in range(0, 512, 2)]
        assert low_high == [20240520, 1, len(part)] + [0] * 253
    assert f"train: {len(train):,} tokens" in capsys.readouterr().out
    # and it is read back without a word about its tokenizer
    data = build_dataset(str(out))
    assert data.val is not None and data.tokenizer.name == "bytes"
    assert (data.train[:].tolist(), data.val[:].tolist()) == (train, val)
    assert (data.train_bytes, data.val_bytes) == (len(train) - 1, len(val) - 1)


def test_to_nanogpt(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare([str(text)], out, tokenizer="bytes", to="nanogpt", shard_tokens=100)
    train, val = expected(text)
    assert read_uint16(out / "train.bin") == train and read_uint16(out / "val.bin") == val
    data = build_dataset(str(out))
    assert data.train[:].tolist() == train


def test_characters_to_nanogpt_bring_its_vocabulary(text: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts" / "b.txt"
    prepare([str(data)], tmp_path / "out", tokenizer="char", to="nanogpt")
    (tmp_path / "theirs").mkdir()
    write_meta(tmp_path / "theirs", "".join(sorted(set(TEXT))))
    written = (tmp_path / "out" / "meta.pkl").read_bytes()
    # the same dictionary: loading it here, of our own making, is safe
    assert pickle.loads(written) == pickle.loads((tmp_path / "theirs" / "meta.pkl").read_bytes())


@pytest.mark.parametrize("to", ["fastgpt2", "llmc", "nanogpt"])
def test_token_files_of_others_are_converted(tmp_path: Path, to: str) -> None:
    train, val = list(range(200)), [3, 2, 1]
    write_llmc(tmp_path / "x_train_1.bin", train[:150])
    write_llmc(tmp_path / "x_train_2.bin", train[150:])
    write_llmc(tmp_path / "x_val.bin", val)
    theirs = write_nanogpt(tmp_path / "nano", train, val)
    for number, source in enumerate((str(tmp_path / "x_*.bin"), str(theirs))):
        out = tmp_path / f"{to}{number}"
        prepare([source], out, vocab_size=200, to=to)
        data = build_dataset(str(out))
        assert data.val is not None
        assert (data.train[:].tolist(), data.val[:].tolist()) == (train, val)
        assert data.tokenizer.vocab_size == 200
    # and once more, from what was written
    prepare([str(out)], tmp_path / "again", to="fastgpt2")
    prepared = open_prepared(tmp_path / "again")
    assert prepared.tokens["train"][:].tolist() == train


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard-tokens", "3000000000", "--to", "llmc"], "a file of llmc holds 2147483647 ids"),
        (["--vocab-size", "9"], "--vocab-size 9: is for token files, and the data are text"),
    ],
)
def test_mistakes_are_one_line(
    text: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["--data", str(text), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert main([*args, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_does_not_read_back_gets_no_name(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that loses the last id."""
    monkeypatch.setattr("fastgpt2.text.shards.IdWriter.sha256", property(lambda writer: bytes(32)))
    args = ["--data", str(text), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert main([*args, "--to", "nanogpt", "--workers", "1"]) == 2
    assert "does not read back as it was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_uint16_holds_no_larger_vocabulary(tmp_path: Path) -> None:
    class Large(BytesTokenizer):
        vocab_size = 65537

    with (
        pytest.raises(ValueError, match="uint16 cannot hold the vocabulary of 65537"),
        create_llmc(tmp_path / "a.bin", Large()),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
