"""Kill -9 in the middle of a checkpoint: the run is resumed, and ends the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt2 import runs
from fastgpt2.files import is_temporary
from fastgpt2.train import checkpoint
from fastgpt2.train.__main__ import main as train_command
from tests.train.killed import POINTS, kill_config
from tests.train.ranks import COMMON
from tests.train.tiny_run import assert_same_training, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def killed_runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.train.killed", str(data), str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("point", [name for name in POINTS if name not in ("whole", "beginning")])
def test_killed_while_saving(killed_runs: Path, data: Path, point: str) -> None:
    run = killed_runs / point
    survivor = runs.latest(run)
    saved = point in ("after_rename", "pruning")
    assert survivor.name == ("step_00000004" if saved else "step_00000002")
    # what has a checkpoint's name is a whole one
    for folder in (run / "checkpoints").glob("step_*"):
        assert checkpoint.load_model(folder)
    assert runs.best(run) == survivor
    assert train(kill_config(data), run, resume=True).exit_code == 0
    assert_same_training(run, killed_runs / "whole")
    # nothing half-written is left lying about
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {path.name for path in (killed_runs / "whole" / "checkpoints").iterdir()}


@pytest.mark.usefixtures("no_picture")
def test_killed_as_it_begins(killed_runs: Path, data: Path) -> None:
    """The same command begins again: what was left in the run folder is nobody's."""
    run = killed_runs / "beginning"
    left = [path for path in run.iterdir() if is_temporary(path)]
    assert len(left) == 1 and not runs.is_run(run)
    assert train_command(["--data", str(data), "--out", str(run), *COMMON]) == 0
    assert not left[0].exists()
