"""Ctrl-C at any moment of a command: while its libraries are imported, and after all is done."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt2 import early
from fastgpt2.__main__ import COMMANDS
from fastgpt2.cli import run

ROOT = Path(__file__).parents[1]
# as if the user pressed Ctrl-C during the seconds that this takes; the module must never see it
IMPORTED = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    import time; time.sleep(1)
except BaseException:
    pass
raise RuntimeError("went on")
"""
PROGRAMS = [f"fastgpt2.{name}" for name in (*COMMANDS, "ladder", "kernels.report")]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals between processes")
@pytest.mark.parametrize("module", [*PROGRAMS, "fastgpt2 train"])
def test_ctrl_c_while_a_command_is_imported(tmp_path: Path, module: str) -> None:
    # prepare needs no PyTorch
    for name in ("torch", "numpy"):
        (tmp_path / f"{name}.py").write_text(IMPORTED, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-m", *module.split()],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"")


def handler_during_a_command() -> object:
    found: list[object] = []
    assert run("x", lambda: found.append(signal.getsignal(signal.SIGINT))) == 0
    return found[0]


def test_a_command_is_interrupted_by_an_exception() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        assert handler_during_a_command() is signal.default_int_handler
        early.end_at_once()
        at_once = signal.getsignal(signal.SIGINT)
        assert at_once is not signal.default_int_handler
        assert handler_during_a_command() is signal.default_int_handler
        # the interpreter's own end takes time, too
        assert signal.getsignal(signal.SIGINT) is at_once
        # nohup's or a shell's background job
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        early.end_at_once()
        with early.ending_at_once():
            assert handler_during_a_command() is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("argv", "original", "expected"),
    [
        (["-m"], ["python", "-m", "fastgpt2.train"], True),
        (["-m", "--steps", "1"], ["python", "-u", "-mfastgpt2", "--steps", "1"], True),
        (["-m", "fastgpt2"], ["python", "-m", "others.tool", "fastgpt2"], False),
        (["-m"], ["python", "-m", "fastgpt2x"], False),
        (["train.py"], ["python", "train.py"], False),
        (["-c"], ["python", "-c", "import fastgpt2"], False),
        ([], [], False),
    ],
)
def test_only_our_own_programs_change_the_handler(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], original: list[str], expected: bool
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert early.is_program("fastgpt2") is expected
