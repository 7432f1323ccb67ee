import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastgpt2 import streams
from fastgpt2.prepare import main, prepare
from fastgpt2.text import CharTokenizer, GPT2Tokenizer, save_tokenizer
from fastgpt2.text.encoding import END_OF_TEXT
from fastgpt2.text.prepared import open_prepared
from tests.text.tiny import tiny_files

TEXT = "".join(f"the {i} and\n" for i in range(3000))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_command_writes_a_folder_that_reads_back(
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "BAR_DELAY", 0.0)
    out = tmp_path / "new" / "tokens"
    args = ["--data", str(text), "--out", str(out), "--tokenizer", "bytes", "--workers", "1"]
    assert main([*args, "--shard-tokens", "10000", "--val-fraction", "0.25"]) == 0
    prepared = open_prepared(out)
    ids = [id_ for split in ("train", "val") for id_ in prepared.tokens[split][:].tolist()]
    assert ids.pop() == prepared.tokenizer.eot and bytes(ids).decode("utf-8") == TEXT
    assert len(prepared.tokens["val"]) == -(-len(TEXT) // 4) + 1
    assert [header.count for header in prepared.tokens["train"].headers] == [10000, 10000, 8417]
    printed = capsys.readouterr()
    assert "train: 28,417 tokens of 28,417 bytes in 3 shard(s)" in printed.out
    assert f"python -m fastgpt2.train --data {out}" in printed.out
    assert "tokenizing: 100%" in printed.err
    # nothing temporary is left beside it
    assert os.listdir(out.parent) == ["tokens"]


def test_result_does_not_depend_on_workers_or_pieces(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = tmp_path / "vocab"
    save_tokenizer(GPT2Tokenizer(*tiny_files()), vocab)
    data = [str(text), "python-docs"]
    prepare(data, tmp_path / "one", vocab_dir=str(vocab), workers=1)
    monkeypatch.setattr("fastgpt2.text.corpora.PIECE_BYTES", 10_000)
    prepare(data, tmp_path / "two", vocab_dir=str(vocab), workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_characters_come_from_the_whole_text(text: Path, tmp_path: Path) -> None:
    prepare([str(text)], tmp_path / "out", tokenizer="char")
    prepared = open_prepared(tmp_path / "out")
    assert isinstance(prepared.tokenizer, CharTokenizer)
    assert prepared.tokenizer.chars == tuple(sorted(set(TEXT)))


def test_folder_holds_all_that_training_needs(text: Path, tmp_path: Path) -> None:
    vocab = tmp_path / "vocab"
    save_tokenizer(GPT2Tokenizer(*tiny_files()), vocab)
    prepare([str(text)], tmp_path / "out", vocab_dir=str(vocab), val_fraction=0.0)
    shutil.rmtree(vocab)
    prepared = open_prepared(tmp_path / "out")
    assert prepared.tokenizer.decode(prepared.tokens["train"][:].tolist()) == TEXT + END_OF_TEXT


def test_an_empty_folder_may_be_there(text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare([str(text)], tmp_path / "out", tokenizer="bytes")
    assert open_prepared(tmp_path / "out").tokenizer.name == "bytes"


@pytest.mark.parametrize(
    "flaw", ["full", "file", "utf8", "empty", "missing", "workers", "fraction"]
)
def test_mistakes_are_one_line_and_2(
    flaw: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    args = ["--data", str(text), "--out", str(out), "--tokenizer", "bytes"]
    if flaw == "full":
        out.mkdir()
        (out / "mine").write_text("precious", encoding="utf-8")
        message = f"{out}: exists already and is not empty"
    elif flaw == "file":
        out.write_text("precious", encoding="utf-8")
        message = f"{out}: exists already"
    elif flaw == "utf8":
        text.write_bytes(b"good\n" * 9 + b"\xff")
        message = f"data: {text} is not UTF-8: byte 0xff at offset 45"
    elif flaw == "empty":
        text.write_bytes(b"")
        message = f"data: {text} is empty"
    elif flaw == "missing":
        text.unlink()
        message = "no file, folder, pattern or corpus"
    elif flaw == "workers":
        args += ["--workers", "0"]
        message = "--workers must be positive, got 0"
    else:
        args += ["--val-fraction", "1"]
        message = "--val-fraction must be in [0, 1), got 1.0"
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(args) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith("fastgpt2 prepare: error: ") and message in errors[0]
    # and nothing is changed or left behind
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not out.is_dir() or contents(out) == {"mine": b"precious"}


def run(args: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "fastgpt2.prepare", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        start_new_session=True,
    )


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    path.write_bytes(b"the quick brown fox\n" * 5_000_000)
    process = run(["--data", str(path), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"])
    while not list(tmp_path.glob(".out.*/.*.tmp")):
        assert process.poll() is None
        time.sleep(0.05)
    # as a terminal does, to the workers too
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err and "interrupted" in err
    assert os.listdir(tmp_path) == ["big.txt"]


MEASURED = """
import sys
from fastgpt2.prepare import main

def peak():
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

if __name__ == "__main__":
    before = peak()
    assert main(sys.argv[1:]) == 0
    assert "torch" not in sys.modules
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(MEASURED, encoding="utf-8")
    grown = []
    for megabytes in (8, 48):
        path = tmp_path / f"{megabytes}.txt"
        path.write_bytes(b"the quick brown fox\n" * (megabytes * 50_000))
        args = ["--data", str(path), "--out", str(tmp_path / f"{megabytes}"), "--workers", "1"]
        result = subprocess.run(
            [sys.executable, script, *args, "--tokenizer", "bytes"],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )
        grown.append(int(result.stdout.splitlines()[-1]))
    # kilobytes: six times the text, 96 MB of ids, and hardly more memory
    assert grown[1] < grown[0] + 8_000


_KILLED = """
import multiprocessing, os, signal, sys
from concurrent.futures import ProcessPoolExecutor
from fastgpt2.text.tokenizing import _start_worker

context = multiprocessing.get_context("spawn")
pool = ProcessPoolExecutor(1, context, initializer=_start_worker, initargs=(sys.argv[1],))
print(pool.submit(os.getpid).result(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    save_tokenizer(CharTokenizer("abc"), tmp_path)
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    # the worker holds the other end of this pipe: a worker that stays means a timeout here
    killed = subprocess.run(command, stdout=subprocess.PIPE, check=False, timeout=30)
    assert killed.returncode == -signal.SIGKILL and int(killed.stdout) > 0
