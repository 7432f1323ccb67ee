"""A run finds its corpus again, from whichever folder it is resumed."""

import os
import sys
from pathlib import Path

import pytest

from fastgpt2.train.__main__ import main as train
from fastgpt2.train.config_file import read_config
from tests.commands.tiny_command import TEXT, TINY, complaint


def test_a_run_resumes_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here / "notes", there):
        folder.mkdir(parents=True)
    for name in ("a.txt", "notes/b.txt"):
        (here / name).write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(here)
    assert train(["--data", "a.txt", "notes", "not*/*.txt", "--out", "run", *TINY]) == 0
    monkeypatch.chdir(there)
    assert train(["--out", str(here / "run"), "--resume", "--steps", "4"]) == 0
    assert read_config(str(here / "run" / "config.toml"))["data"] == (
        str(here / "a.txt"),
        str(here / "notes"),
        str(here / "not*/*.txt"),
    )
    (here / "notes" / "b.txt").write_text(TEXT.replace("cat", "cow"), encoding="utf-8")
    line = complaint(train, ["--out", str(here / "run"), "--resume", "--steps", "5"], capsys)
    assert "the data has changed" in line


def test_the_name_of_a_corpus_stays_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(["--data", "python-docs", "--out", "run", *TINY, "--steps", "1"]) == 0
    assert read_config("run/config.toml")["data"] == ("python-docs",)


@pytest.mark.skipif(sys.platform == "win32", reason="no /dev/fd")
def test_train_reads_a_process_substitution(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For ``<(cat FILE)`` bash passes the name of a pipe that the command has inherited."""
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "wb") as pipe:
        # less than a pipe's buffer
        pipe.write(Path(data).read_bytes())
        pipe.close()
        assert train(["--data", f"/dev/fd/{reader}", "--out", str(tmp_path / "run"), *TINY]) == 0
    assert "trained 3 steps" in capsys.readouterr().out
