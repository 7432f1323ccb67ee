"""``train`` on the token files of other programs."""

from pathlib import Path

import pytest

from fastgpt2.errors import UserError
from fastgpt2.text import load_tokenizer
from fastgpt2.train.__main__ import main as train
from tests.commands.tiny_command import TEXT, TINY, complaint
from tests.text.other_programs import write_llmc, write_meta, write_nanogpt

# without the tokenizer that TINY chooses
FLAGS = TINY[1:]


def test_characters_of_nanogpt_train_and_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chars = "".join(sorted(set(TEXT)))
    ids = [chars.index(char) for char in TEXT]
    nano = write_nanogpt(tmp_path / "nano", ids[:900], ids[900:])
    write_meta(nano, chars)
    run = str(tmp_path / "run")
    line = complaint(train, ["--data", str(nano), "--out", run, *FLAGS], capsys)
    assert "meta.pkl" in line and "never opened" in line and "--vocab-size" in line
    argv = ["--data", str(nano), "--vocab-size", str(len(chars)), "--out", run]
    assert train([*argv, *FLAGS]) == 0
    printed = capsys.readouterr().out
    assert "900 training and" in printed and "nats/token" in printed and "byte" not in printed
    assert load_tokenizer(run).name == "ids"
    assert train(["--out", run, "--resume", "--steps", "4"]) == 0
    write_nanogpt(tmp_path / "nano", ids[1:901], ids[900:])
    line = complaint(train, ["--out", run, "--resume", "--steps", "5"], capsys)
    assert "the data has changed" in line


def test_an_id_beyond_the_vocabulary_stops_before_step_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_llmc(tmp_path / "a_train.bin", [1] * 99 + [257])
    argv = ["--data", str(path), "--out", str(tmp_path / "run"), *TINY]
    line = complaint(train, argv, capsys)
    assert line == f"token file {path}: id 257 at position 99 is not in the vocabulary of 257"
    assert not (tmp_path / "run" / "config.toml").exists()


def test_a_damaged_file_is_named_before_a_vocabulary_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_vocabulary(*arguments: object, **options: object) -> None:
        raise UserError("no GPT-2 vocabulary")

    monkeypatch.setattr("fastgpt2.text.token_files.get_tokenizer", no_vocabulary)
    path = tmp_path / "noise.bin"
    path.write_bytes(bytes(range(1, 200)) * 20)
    line = complaint(train, ["--data", str(path), "--out", str(tmp_path / "run"), *FLAGS], capsys)
    assert f"token file {path}: expected llm.c's magic number" in line
