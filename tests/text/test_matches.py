"""Folders, patterns, links, pipes: which files a corpus is made of."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastgpt2.errors import UserError
from fastgpt2.text import pipes
from fastgpt2.text.corpora import load_corpus
from fastgpt2.text.pipes import read_once

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")


def names(data: Path | str, below: Path) -> list[str]:
    return [os.path.relpath(document.name, below) for document in load_corpus(str(data)).documents]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with links to a folder outside, to a file, to itself, to nothing."""
    outside, inside = tmp_path / "outside", tmp_path / "in[1]"
    for path in (outside / "deep" / "far.txt", inside / "a.txt", inside / "sub" / "b.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name, encoding="utf-8")
    (outside / ".git").mkdir()
    (outside / ".git" / "config").write_text("hidden", encoding="utf-8")
    (inside / "link").symlink_to(outside)
    (inside / "second").symlink_to(outside)
    (inside / "sub" / "up").symlink_to("..")
    (outside / "back").symlink_to(inside)
    (inside / "same.txt").symlink_to("a.txt")
    (inside / "self").symlink_to("self")
    (inside / "nothing").symlink_to("missing")
    return inside


def test_a_folder_is_the_same_corpus_as_its_pattern(corpus: Path) -> None:
    expected = ["a.txt", "link/deep/far.txt", "sub/b.txt"]
    assert names(corpus, corpus) == expected
    escaped = str(corpus).replace("[1]", "[[]1]")
    for pattern in ("**", "**/*", "**/*.txt", "**/**/*"):
        assert names(f"{escaped}/{pattern}", corpus) == expected
    assert names(f"{escaped}/*/**/f*.txt", corpus) == ["link/deep/far.txt"]
    assert names(f"{escaped}/*.txt", corpus) == ["a.txt"]


def test_a_pattern_from_here(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus)
    expected = ["a.txt", "link/deep/far.txt", "sub/b.txt"]
    for data in (".", "**", "./**/*.txt", "../in*/**"):
        assert names(data, corpus) == expected
    with pytest.raises(UserError, match="no file, folder, pattern"):
        load_corpus("**/*.md")


def test_many_links_between_folders_end(tmp_path: Path) -> None:
    for name in "abcdefgh":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("x", encoding="utf-8")
        for other in "abcdefgh":
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    assert len(load_corpus(str(tmp_path)).documents) == 8
    assert len(load_corpus(f"{tmp_path}/**/*.txt").documents) == 8


def test_a_pipe_is_read_once() -> None:
    read, write = os.pipe()
    os.write(write, "né".encode())
    os.close(write)
    corpus = load_corpus(f"/dev/fd/{read}")
    os.close(read)
    # the vocabulary of char, and then the tokens, need the text twice
    assert ["".join(corpus.pieces()) for _ in range(2)] == ["né", "né"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes as files")
def test_a_pipe_without_a_writer_is_waited_for_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, say, writers = tmp_path / "pipe", pipes._say, []

    def said(item: str) -> None:
        say(item)
        writers.append(threading.Thread(target=pipe.write_bytes, args=(b"text",)))
        writers[0].start()

    os.mkfifo(pipe)
    monkeypatch.setattr(pipes, "PATIENCE", 0.01)
    monkeypatch.setattr(pipes, "_say", said)
    assert read_once(str(pipe)) == b"text"
    writers[0].join()
    assert capsys.readouterr().err == f"waiting for the end of {pipe} ...\n"


@pytest.mark.parametrize(("device", "message"), [("/dev/zero", "device"), ("/dev/null", "empty")])
def test_devices_are_refused(device: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_corpus(device)


def test_standard_input_is_a_corpus(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastgpt2.prepare", "--data", "/dev/stdin", "--out"]
    out, text = tmp_path / "shards", b"the cat sat on the mat\n" * 50
    options = ["--tokenizer", "bytes", "--workers", "1"]
    done = subprocess.run([*command, str(out), *options], input=text, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"train: 1,035 tokens" in done.stdout
