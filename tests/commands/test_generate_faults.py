"""``generate --output`` and ``--score`` under every fault: whole lines, and one that says why."""

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from fastgpt2.generate.__main__ import main
from tests.commands.tiny_generate import records
from tests.faults import SIGNALS, BreakingStream, failing_disk, signal_at

MODES = {
    "texts": ["--max-new-tokens=3", "--seed=1", "--batch-size=2", "--greedy"],
    "scores": ["--score", "--batch-size=2"],
}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\nthree\n", encoding="utf-8")
    return path


def run(tiny: Path, prompts: Path, out: Path, mode: str, *flags: str) -> int:
    files = ["--model", str(tiny), "--input", str(prompts), "--output", str(out)]
    return main([*files, *MODES[mode], *flags])


def found(out: Path) -> list[Any]:
    """The results, all of them whole lines; nothing where there is no file."""
    if not out.exists():
        return []
    assert out.read_bytes().endswith(b"\n")
    return [(r["index"], r["ids"]) for r in records(out)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lasts", [False, True])
def test_a_disk_that_fails_at_any_write(
    tiny: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    lasts: bool,
) -> None:
    assert run(tiny, prompts, tmp_path / "sound", mode) == 0
    sound, counts = found(tmp_path / "sound"), []
    for n in range(1, 50):
        out = tmp_path / str(n)
        capsys.readouterr()
        with failing_disk(n, out, lasts=lasts) as fault:
            code = run(tiny, prompts, out, mode)
        if not fault.happened:
            break
        said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert code == 2 and len(said) == 1 and "No space left on device" in said[0]
        counts.append(len(found(out)))
        assert run(tiny, prompts, out, mode, "--resume") == 0
        assert found(out) == sound
    # opened, three lines, synced
    assert code == 0 and counts == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_at_any_pass(
    tiny: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    number = getattr(signal, name)
    assert run(tiny, prompts, tmp_path / "sound", "texts") == 0
    for n in (1, 4):
        out = tmp_path / str(n)
        capsys.readouterr()
        with signal_at("fastgpt2.generate.generator.Generator.step", n, number) as fault:
            assert run(tiny, prompts, out, "texts") == 128 + number
        assert fault.happened
        said = capsys.readouterr().err.splitlines()
        assert said[-1] == (
            f"fastgpt2 generate: stopped by {name}; --resume adds the other texts to {out}"
        )
        assert len(found(out)) == (0 if n == 1 else 2)
        assert run(tiny, prompts, out, "texts", "--resume") == 0
        assert found(out) == found(tmp_path / "sound")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("stream", [None, 1, 2])
def test_a_terminal_that_is_not_there(
    tiny: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    stream: int | None,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, name, None if stream is None else BreakingStream(stream))
        assert run(tiny, prompts, tmp_path / "out", "texts") == 0
    assert len(found(tmp_path / "out")) == 3


@pytest.mark.parametrize(("number", "code"), [(errno.EIO, 2), (errno.EPIPE, 141)])
@pytest.mark.parametrize("flags", [[], ["--output=-"], ["--score"]])
def test_a_stdout_that_breaks(
    tiny: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
    flags: list[str],
) -> None:
    class Broken(BreakingStream):
        def write(self, text: str) -> int:
            raise OSError(number, os.strerror(number))

        flush = lambda _: None  # noqa: E731

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Broken(1))
        assert main(["--model", str(tiny), "--prompt=x", *flags]) == code
    said = capsys.readouterr().err
    assert said == ("" if code == 141 else f"fastgpt2 generate: error: {os.strerror(number)}\n")


def test_two_processes_do_not_share_a_file(
    tiny: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "out"
    with open(out, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run(tiny, prompts, out, "texts") == 2
    assert "another process is writing it" in capsys.readouterr().err
    assert run(tiny, prompts, out, "texts") == 0
    assert len([json.loads(line) for line in out.read_text("utf-8").splitlines()]) == 3
