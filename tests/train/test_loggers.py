"""TensorBoard and Weights & Biases: what they are told, and that they never end a run."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastgpt2.errors import UserError
from fastgpt2.train import loggers
from fastgpt2.train.loggers import Log
from fastgpt2.train.metrics import read_metrics
from tests.train.tiny_run import make_trainer, tiny_train_config, train

pytestmark = pytest.mark.usefixtures("no_picture")

WRITE_WANDB = """
import sys
from pathlib import Path
from fastgpt2.train.loggers import Log
log = Log(Path(sys.argv[1]), 0, ("wandb",), {"lr": 0.1}, print)
log.write(step=1, train_loss=2.0)
log.close(0)
"""
READ_TENSORBOARD = """
import sys
# a real TensorFlow would be taken, and takes seconds to import
sys.modules["tensorboard.compat.notf"] = type(sys)("notf")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1]).Reload()
for tag in events.Tags()["scalars"]:
    print(tag, *(f"{e.step}:{e.value:.6g}" for e in events.Scalars(tag)))
"""


class Told:
    """A logger that remembers, and fails where it is told to."""

    def __init__(self, run: Path, step: int, config: dict[str, Any]) -> None:
        self.run, self.step, self.config = run, step, config
        self.records: list[tuple[int, dict[str, float]]] = []
        self.ended: int | None = None
        if Told.fails == "open":
            raise OSError("no room")
        Told.last = self

    fails = ""
    last: "Told"

    def write(self, step: int, values: dict[str, float]) -> None:
        if Told.fails == "write" and step > 2:
            raise ValueError("a line\nand another")
        self.records.append((step, values))

    def close(self, exit_code: int) -> None:
        self.ended = exit_code
        if Told.fails == "close":
            raise RuntimeError("lost")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> type[Told]:
    monkeypatch.setitem(loggers.LOGGERS, "wandb", Told)
    monkeypatch.setattr(Told, "fails", "")
    return Told


def test_a_logger_is_told_what_the_metrics_say(
    data: Path, tmp_path: Path, told: type[Told]
) -> None:
    train(tiny_train_config(data, steps=4, log=("wandb",)), tmp_path)
    expected = [
        (r["step"], {k: v for k, v in r.items() if k != "step"}) for r in read_metrics(tmp_path)
    ]
    assert told.last.records == expected and len(expected) >= 4
    assert told.last.ended == 0 and told.last.config["n_embd"] == 16
    train(tiny_train_config(data, steps=6, log=("wandb",)), tmp_path, resume=True)
    assert told.last.step == 4 and next(step for step, _ in told.last.records) > 4


@pytest.mark.parametrize("fails", ["open", "write", "close"])
def test_a_logger_that_fails_ends_nothing(
    data: Path, tmp_path: Path, told: type[Told], fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(told, "fails", fails)
    trainer = make_trainer(tiny_train_config(data, log=("wandb",)), tmp_path)
    said: list[str] = []
    monkeypatch.setattr(trainer.console, "say", said.append)
    assert trainer.run().step == 7
    [line] = [line for line in said if line.startswith("log: ")]
    assert "wandb has failed" in line and "\n" not in line
    assert read_metrics(tmp_path)[-1]["step"] == 7


def test_a_run_that_fails_is_told_so(
    data: Path, tmp_path: Path, told: type[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_train_config(data, log=("wandb",)), tmp_path)
    monkeypatch.setattr(trainer, "_evaluate", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert told.last.ended == 1


def test_a_logger_that_is_not_installed_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    said: list[str] = []
    log = Log(tmp_path, 0, ("tensorboard", "wandb"), {}, said.append)
    log.write(step=1, train_loss=2.0)
    log.close(0)
    assert len(said) == 2
    assert all(
        f"pip install 'fastgpt2[{n}]'" in s for n, s in zip(loggers.LOGGERS, said, strict=True)
    )
    assert read_metrics(tmp_path) == [{"step": 1, "train_loss": 2.0}]


def test_tensorboard_reads_the_scalars(tmp_path: Path) -> None:
    """By its own reader; a resume takes the place of what came after its step."""
    log = Log(tmp_path, 0, ("tensorboard",), {}, pytest.fail)
    for step in (1, 2, 3):
        log.write(step=step, train_loss=1.0 / step, lr=None)
    log.close(0)
    log = Log(tmp_path, 2, ("tensorboard",), {}, pytest.fail)
    log.write(step=3, train_loss=0.25, lr=0.5)
    log.close(0)
    command = [sys.executable, "-c", READ_TENSORBOARD, str(tmp_path / "tensorboard")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    assert set(said.splitlines()) == {"train_loss 1:1 2:0.5 3:0.25", "lr 3:0.5"}


def test_wandb_works_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    # an address that nothing answers
    environment |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", WRITE_WANDB, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    [stored] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"train_loss" in stored.read_bytes()


def test_names_of_loggers(data: Path) -> None:
    config = tiny_train_config(data, log=("tensorboard,wandb", "wandb"))
    assert config.loggers == ("tensorboard", "wandb") == tuple(loggers.LOGGERS)
    with pytest.raises(UserError, match="log must be of tensorboard, wandb, got 'mlflow'"):
        tiny_train_config(data, log=("mlflow",))
