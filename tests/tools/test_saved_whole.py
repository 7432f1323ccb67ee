"""What a tool has measured for hours is saved whole, then shown: under a full or broken disk, and
without a terminal.

A tool is a line of ``TOOLS``: what it measures is replaced, how it writes is not.
"""

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import processes
from fastgpt2.kernels import report
from tests.faults import BreakingStream, failing_disk
from tools import (
    default_run,
    loss_match,
    optimizer_sweep,
    scaling,
    step_budget,
    step_history,
    to_loss,
    tune,
    versions,
)

Command = Callable[[Path], int]
Patch = pytest.MonkeyPatch
SETTING = optimizer_sweep.Setting("Muon", (), 5)
RUN = {"name": "Muon", "flags": [], "seed": 1, "curve": [[1, 2.5], [5, 1.5]]}
POINTS = [{"step": 1, "val_loss": 1.5, "seconds": 1.0}]


def budget(patch: Patch, name: str) -> Command:
    patch.setattr(processes, "machine", lambda _: {})
    patch.setattr(step_budget, "ask", lambda *_: {"seconds": 1.0})
    patch.setattr(step_budget, "table", str)
    flags = ["--scale=dry", "--dtype=fp32", "--contenders", step_budget.CONTENDERS[0]]
    return lambda out: step_budget.main(["--out", str(out / name), *flags])


def history(patch: Patch, name: str) -> Command:
    patch.setattr(processes, "machine", lambda _: {})
    patch.setattr(step_history, "ask", lambda *_, **__: [1.0])
    patch.setattr(step_history, "check_out", lambda commit, _: (commit, "subject"))
    return lambda out: step_history.main(["HEAD", "--out", str(out / name), "--turns=1"])


def match(patch: Patch, name: str) -> Command:
    patch.setattr(loss_match, "machine", lambda _: {})
    patch.setattr(loss_match, "match", lambda *_: {"summary": {}, "runs": [RUN]})
    return lambda out: loss_match.main(["--out", str(out / name), "--device=cpu"])


def race(patch: Patch, name: str) -> Command:
    def runs(text: Path, theirs: Path, seeds: int, record: dict[str, Any], out: Path) -> None:
        # the file is written after each run
        for who in ("nanogpt", "fastgpt2"):
            run = {"who": who, "seed": 1, "curve": POINTS}
            to_loss.note(run, record, to_loss.summary, out)

    patch.setattr(to_loss, "machine", lambda _: {})
    patch.setattr(to_loss, "race", runs)
    return lambda out: to_loss.main(["text", "nanogpt", "--out", str(out / name)])


def default(patch: Patch, name: str) -> Command:
    patch.setattr(to_loss, "machine", lambda _: {})
    patch.setattr(default_run, "curve", lambda *_: POINTS)
    return lambda out: default_run.main(["--out", str(out / name), "--seeds=1"])


def tuned(patch: Patch, name: str) -> Command:
    patch.setattr(tune, "machine", lambda _: {})
    patch.setattr(tune.Tuner, "tune", lambda *_: None)
    patch.setattr(tune, "op_cases", lambda *_: [SimpleNamespace(label="op")])
    return lambda out: tune.main(["--out", str(out), "--dry"])


def sweep(patch: Patch, name: str) -> Command:
    patch.setattr(optimizer_sweep, "machine", lambda _: {})
    patch.setattr(optimizer_sweep, "SWEEP", (SETTING,))
    patch.setattr(optimizer_sweep, "run_one", lambda *_: RUN)
    patch.setattr(optimizer_sweep, "step_seconds", dict)
    patch.setattr(optimizer_sweep, "draw", lambda *_: None)
    return lambda out: optimizer_sweep.main(["text", str(out)])


def matrix(patch: Patch, name: str) -> Command:
    patch.delenv("TRITON_INTERPRET", raising=False)
    # imported without the interpreter, they would be lost to the tests that follow
    patch.setattr(report, "kernel_modules", list)
    patch.setattr(report, "tasks_of", lambda *_: [])
    patch.setattr(report, "measure", lambda *_: [])

    def update(out: Path) -> int:
        patch.setattr(report, "REPORT", out / name)
        patch.setattr(report, "expectation_file", lambda _: out / "expectation.json")
        return report.main(["--update"])

    return update


def page(patch: Patch, name: str) -> Command:
    def write(out: Path) -> int:
        patch.setattr(scaling, "PAGE", out / name)
        return scaling.main(["--write"])

    return write


def pairs(patch: Patch, name: str) -> Command:
    patch.setattr(versions, "run_pair", lambda *_: "")

    def run(out: Path) -> int:
        patch.setattr(versions, "REPORT", out / name)
        return versions.main([str(out), "--pair=2.13.0,3.7.1"])

    return run


# a tool, a file that it writes, and what that holds before
OLD = '{"runs": []}'
TOOLS = {
    "step_budget": (budget, "out.json", OLD),
    "step_history": (history, "out.json", OLD),
    "loss_match": (match, "out.json", OLD),
    "to_loss": (race, "out.json", OLD),
    "default_run": (default, "out.json", OLD),
    "tune": (tuned, "tune.json", OLD),
    "optimizer_sweep": (sweep, "sweep.json", OLD),
    "kernels.report": (matrix, "REPORT.md", OLD),
    "scaling": (page, "scaling.md", f"old\n{scaling.BEGIN}{scaling.END}"),
    "versions": (pairs, "REPORT.md", OLD),
}


@pytest.fixture(params=TOOLS)
def tool(request: pytest.FixtureRequest, monkeypatch: Patch) -> tuple[Command, str, str]:
    make, name, before = TOOLS[request.param]
    return make(monkeypatch, name), name, before


def test_a_disk_that_fails_at_any_write(
    tool: tuple[Command, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, name, before = tool

    def folder(n: int) -> Path:
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / name).write_text(before, encoding="utf-8")
        return tmp_path / str(n)

    assert command(folder(0)) == 0
    sound = {path.name: path.read_bytes() for path in (tmp_path / "0").iterdir()}
    for n in range(1, 60):
        out = folder(n)
        capsys.readouterr()
        number, lasts = ((errno.ENOSPC, True), (errno.EIO, False))[n % 2]
        with failing_disk(n, out, lasts=lasts, number=number) as fault:
            code = command(out)
        if not fault.happened:
            break
        if code == 0:
            # making a folder that is there already may fail
            continue
        said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert (code, len(said)) == (2, 1), (n, said)
        assert os.strerror(number) in said[0]
        # each file is whole, as it was before or newer, and nothing temporary is left
        assert {path.name for path in out.iterdir()} <= sound.keys()
        for path in out.iterdir():
            content = path.read_bytes()
            if path.suffix == ".json":
                json.loads(content)
            else:
                assert content in (sound[path.name], before.encode())
    assert code == 0 and n > 4


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_terminal_that_is_gone(
    tool: tuple[Command, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    command, name, before = tool
    (tmp_path / name).write_text(before, encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(sys, stream, BreakingStream(1))
        assert command(tmp_path) == 0
    if command.__qualname__ != "pairs.<locals>.run":
        # that one puts back what was there
        assert (tmp_path / name).read_text(encoding="utf-8") != before
