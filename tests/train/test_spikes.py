"""A loss that jumps is said, and if asked for undone."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fastgpt2 import runs
from fastgpt2.train.metrics import read_metrics
from fastgpt2.train.spikes import Spikes
from fastgpt2.train.step import StepResult, TrainingStep
from fastgpt2.train.trainer import Trainer
from tests.train.tiny_run import tiny_train_config, train

pytestmark = pytest.mark.usefixtures("no_picture")


def noise(n: int) -> list[float]:
    return [3.0 + 0.1 * math.sin(i) for i in range(n)]


def test_a_jump_is_a_spike_and_a_fall_is_none() -> None:
    spikes = Spikes()
    assert all(spikes.score(loss) is None for loss in noise(60))
    assert spikes.score(1.0) is None
    assert spikes.score(math.nan) is None
    assert (spikes.score(9.0) or 0) > 6
    # it does not hide the next one
    assert (spikes.score(9.0) or 0) > 6
    spikes.clear()
    assert spikes.score(9.0) is None


def spiking(monkeypatch: pytest.MonkeyPatch, at: int) -> list[Tensor]:
    """The loss of step number ``at``, from 1, is ten times as large; the inputs of each step."""
    whole, seen = TrainingStep.__call__, []

    def call(self: TrainingStep, batches: Sequence[Any], lr: float) -> StepResult:
        seen.append(batches[0][0])
        result = whole(self, batches, lr)
        return result._replace(loss=result.loss * 10) if len(seen) == at else result

    monkeypatch.setattr(TrainingStep, "__call__", call)
    return seen


@pytest.mark.parametrize("on_spike", ["warn", "rollback"])
def test_a_spike_in_a_run(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    on_spike: str,
) -> None:
    seen = spiking(monkeypatch, at=33)
    fields: dict[str, Any] = dict(steps=40, eval_every=30, log_every=1, on_spike=on_spike)
    config = tiny_train_config(data, schedule="constant", lr=1e-4, min_lr=0.0, **fields)
    outcome = Trainer(config, tmp_path, notify=lambda line: None).run()
    said = capsys.readouterr().out
    assert "step 33: loss" in said and "is a spike" in said
    assert outcome.step == 40
    back = on_spike == "rollback"
    assert ("gone back to step 30" in said) == back
    # the loss of a step is read after the next one: four steps are taken again, with other data
    assert len(seen) == (44 if back else 40)
    losses = [r["step"] for r in read_metrics(tmp_path) if "train_loss" in r]
    assert losses == list(range(1, 41))
    assert max(r["train_loss"] for r in read_metrics(tmp_path) if "train_loss" in r) < 7 or not back
    if back:
        assert not any(seen[34].equal(earlier) for earlier in seen[30:34])


def test_a_checkpoint_after_the_spike_is_not_gone_back_to(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The log learns of the spike at step 33 when the checkpoint of step 36 has been written."""
    seen = spiking(monkeypatch, at=33)
    fields: dict[str, Any] = dict(steps=50, eval_every=6, log_every=10, on_spike="rollback")
    config = tiny_train_config(data, schedule="constant", lr=1e-4, min_lr=0.0, **fields)
    assert Trainer(config, tmp_path, notify=lambda line: None).run().step == 50
    assert "gone back to step 30" in capsys.readouterr().out
    # step 41 had been computed when the record of step 40 was read
    assert len(seen) == 50 + 11
    # all later checkpoints were written anew, with the weights of their step
    assert runs.saved_steps(tmp_path)[-1] == 50
    steps = [r["step"] for r in read_metrics(tmp_path)]
    assert steps == sorted(steps)
    state = runs.read_state(runs.latest(tmp_path))
    assert state["loader"]["position"] == len(seen) * 8


def test_going_back_takes_time_too(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with --minutes ends after these, whatever it has undone."""
    now = 0.0
    seen = spiking(monkeypatch, at=33)
    whole = TrainingStep.__call__

    def call(self: TrainingStep, batches: Sequence[Any], lr: float) -> StepResult:
        nonlocal now
        now += 1.0
        return whole(self, batches, lr)

    monkeypatch.setattr(TrainingStep, "__call__", call)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    fields: dict[str, Any] = dict(steps=None, minutes=1.0, eval_every=30, log_every=1)
    config = tiny_train_config(data, lr=1e-4, min_lr=0.0, on_spike="rollback", **fields)
    outcome = Trainer(config, tmp_path, notify=lambda line: None).run()
    assert (len(seen), outcome.elapsed) == (60, 60.0)
    assert outcome.step == 60 - 4


def test_a_resumed_run_knows_the_losses_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields: dict[str, Any] = dict(eval_every=50, log_every=4, schedule="constant", lr=1e-4)
    train(tiny_train_config(data, steps=30, min_lr=0.0, **fields), tmp_path)
    spiking(monkeypatch, at=2)
    train(tiny_train_config(data, steps=34, min_lr=0.0, **fields), tmp_path, resume=True)
    assert "step 32: loss" in capsys.readouterr().out
