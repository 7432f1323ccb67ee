"""Steps of the package as it was: of the commit that is asked for, and of no other."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.benchmarks.dry import ROOT
from tools import step_history, step_of_commit

pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="this tree is not a clone: it has no history"
)
DRY = ["--scale", "dry", "--dtype", "fp32", "--turns", "1", "--steps", "1"]


def _head() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "history.json", tmp_path / "seen"
    program = tmp_path / "program.py"
    # says first which package it runs
    program.write_text(
        f"import fastgpt2, fastgpt2.kernels, pathlib\n"
        f"pathlib.Path({str(seen)!r}).write_text(fastgpt2.__file__ + fastgpt2.kernels.__file__)\n"
        + step_history._PROGRAM.read_text(encoding="utf-8"),
        encoding="utf-8",
    )
    monkeypatch.setattr(step_history, "_PROGRAM", program)
    assert step_history.main(["HEAD", "--form", "eager", "--out", str(out), *DRY]) == 0
    (run,) = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert run["commit"] == _head() and len(run["seconds"]) == 1 and run["seconds"][0] > 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["commit", "eager"]
    assert row.startswith(f"{run['commit']:10} ")
    assert str(ROOT) not in seen.read_text(encoding="utf-8")


@pytest.mark.parametrize("files", [["train/allocator.py"], ["train.py", "training/allocator.py"]])
def test_the_allocator_is_found_in_every_version(files: list[str], tmp_path: Path) -> None:
    assert step_of_commit.allocator_module(tmp_path) is None
    for file in files:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = step_of_commit.allocator_module(tmp_path)
    assert found == f"fastgpt2.{Path(files[-1]).parent.name}.allocator"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["no-such-commit"], "no-such-commit: fatal: bad revision 'no-such-commit'"),
        (["HEAD", "--turns", "0"], "--turns: must be 1 or more, got 0"),
    ],
)
def test_mistakes_are_one_line(
    wrong: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step_history.main(["--out", str(tmp_path / "x"), *DRY, *wrong]) == 2
    assert said in capsys.readouterr().err
