"""A run that is stopped and resumed equals one that never was, bit for bit."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt2 import runs
from fastgpt2.errors import UserError
from fastgpt2.train.step import TrainingStep
from fastgpt2.train.validation import validate
from tests.train.tiny_run import (
    assert_same_training,
    make_trainer,
    measured,
    tiny_train_config,
    train,
)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def on_call(count: int, action: Callable[[], None], function: Callable[..., Any]) -> Any:
    """``function``, with ``action`` at the beginning of its call number ``count``, from 1."""
    calls = 0

    def wrapper(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            action()
        return function(*args, **options)

    return wrapper


pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is never interrupted: 7 steps of 2 micro-batches, evaluated at 3, 6 and 7."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train(tiny_train_config(data), run).exit_code == 0
    assert runs.saved_steps(run) == [6, 7]
    return run


# in the first or second micro-batch of the first step, of one in between, of the last
@pytest.mark.parametrize(
    ("micro_batch", "number"),
    [(1, signal.SIGTERM), (2, signal.SIGTERM), (9, signal.SIGINT), (10, signal.SIGTERM), (14, 2)],
)
def test_signal_in_a_micro_batch(
    whole: Path, data: Path, tmp_path: Path, micro_batch: int, number: int
) -> None:
    config = tiny_train_config(data)
    first = make_trainer(config, tmp_path)
    step = first.training_step
    step.forward = on_call(micro_batch, lambda: send(number), step.forward)
    outcome = first.run()
    # a step whose last micro-batch has begun is completed
    assert (outcome.exit_code, outcome.step) == (128 + number, micro_batch // 2)
    assert runs.latest(tmp_path).name == f"step_{outcome.step:08d}"
    torch.manual_seed(0)
    resumed = train(config, tmp_path, resume=True)
    assert (resumed.exit_code, resumed.step) == (0, 7)
    assert_same_training(tmp_path, whole)


# the evaluations at steps 3, 6 and 7
@pytest.mark.parametrize("evaluation", [1, 2, 3])
def test_signal_in_an_evaluation(
    whole: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    evaluation: int,
) -> None:
    config = tiny_train_config(data)
    step = (3, 6, 7)[evaluation - 1]
    with monkeypatch.context() as patch:
        stop = on_call(evaluation, lambda: send(signal.SIGTERM), validate)
        patch.setattr("fastgpt2.train.trainer.validate", stop)
        outcome = train(config, tmp_path)
    assert (outcome.exit_code, outcome.step) == (143, step)
    assert outcome.validation is None
    assert runs.latest(tmp_path).name == f"step_{step:08d}"
    # the evaluation is made up for
    assert train(config, tmp_path, resume=True).exit_code == 0
    assert_same_training(tmp_path, whole)


def test_stopped_again_and_again(whole: Path, data: Path, tmp_path: Path) -> None:
    config = tiny_train_config(data)
    for i in range(7):
        current = make_trainer(config, tmp_path, resume=i > 0)
        step = current.training_step
        # the second micro-batch: half a step's data has been drawn and must be drawn again
        step.forward = on_call(2 if i == 0 else 4, lambda: send(signal.SIGTERM), step.forward)
        outcome = current.run()
    assert outcome.step == 7
    assert_same_training(tmp_path, whole)


def test_killed_between_checkpoints(whole: Path, data: Path, tmp_path: Path) -> None:
    """Everything after the last checkpoint is redone, and recorded once.

    The record of step 4 waits for the end of step 5, in which the process fails.
    """
    config = tiny_train_config(data)
    first = make_trainer(config, tmp_path)

    def die() -> None:
        raise ZeroDivisionError

    step = first.training_step
    step.forward = on_call(9, die, step.forward)
    with pytest.raises(ZeroDivisionError):
        first.run()
    assert runs.latest(tmp_path).name == "step_00000003"
    assert measured(tmp_path)[-1]["step"] == 4
    train(config, tmp_path, resume=True)
    assert_same_training(tmp_path, whole)


def test_a_finished_run_resumes_to_nothing(whole: Path, data: Path, tmp_path: Path) -> None:
    config = tiny_train_config(data)
    finished = train(config, tmp_path)
    again = train(config, tmp_path, resume=True)
    assert again == finished
    assert_same_training(tmp_path, whole)


def test_a_longer_run_goes_on_from_a_shorter_one(data: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = dict(schedule="constant", log_every=1)
    train(tiny_train_config(data, steps=4, **fields), tmp_path / "two")
    train(tiny_train_config(data, steps=7, **fields), tmp_path / "two", resume=True)
    train(tiny_train_config(data, steps=7, **fields), tmp_path / "one")
    different = [record for record in measured(tmp_path / "two") if record["step"] == 4]
    # the end of the first run was evaluated, which the second does not do there
    assert "val_loss" in different[-1]
    ours, theirs = (runs.latest(tmp_path / name) for name in ("two", "one"))
    assert (ours / runs.MODEL).read_bytes() == (theirs / runs.MODEL).read_bytes()
    assert (ours / runs.OPTIMIZER).read_bytes() == (theirs / runs.OPTIMIZER).read_bytes()


def test_fp16_resumes_with_its_loss_scale(data: Path, tmp_path: Path) -> None:
    config = tiny_train_config(data, dtype="fp16")
    runs = [tmp_path / name for name in ("whole", "parts")]
    for run in runs:
        first = make_trainer(config, run)
        scaler, step = first.training_step.scaler, first.training_step
        # a scale of its own: a fresh one would be seen
        scaler.load_state_dict(scaler.state_dict() | {"scale": 1024.0})
        if run == runs[1]:
            step.forward = on_call(9, lambda: send(signal.SIGTERM), step.forward)
        first.run()
    resumed = make_trainer(config, runs[1], resume=True)
    assert resumed.training_step.scaler.get_scale() == 1024.0
    resumed.run()
    assert_same_training(runs[1], runs[0])


@pytest.mark.parametrize("dtypes", [("fp32", "fp16"), ("fp16", "fp32")])
def test_the_dtype_may_change(data: Path, tmp_path: Path, dtypes: tuple[str, str]) -> None:
    for i, dtype in enumerate(dtypes):
        config = tiny_train_config(data, dtype=dtype, steps=3 + i)
        assert train(config, tmp_path, resume=i > 0).exit_code == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "saved with seed 1337, now it is 2"),
        ({"block_size": 8}, "cannot be loaded"),
        ({"n_embd": 32}, "cannot be loaded"),
        ({"val_fraction": 0.3}, "the data has changed"),
    ],
)
def test_what_a_run_is_cannot_change(
    whole: Path, data: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(tiny_train_config(data, **change), whole, resume=True)


def test_dropout_may_change(whole: Path, data: Path) -> None:
    resumed = make_trainer(tiny_train_config(data, dropout=0.0), whole, resume=True)
    assert resumed.model.config.dropout == 0.0


@pytest.mark.parametrize("content", ["{}", '{"tokenizer": 3}', "[]", "{"])
def test_a_damaged_state_is_one_line(data: Path, tmp_path: Path, content: str) -> None:
    config = tiny_train_config(data, steps=1)
    train(config, tmp_path)
    path = runs.latest(tmp_path) / runs.STATE
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="step_00000001"):
        make_trainer(config, tmp_path, resume=True)


@pytest.fixture
def steps_that_count(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every step that is taken."""
    taken: list[int] = []
    whole = TrainingStep.__call__

    def call(self: TrainingStep, *args: Any) -> Any:
        taken.append(1)
        return whole(self, *args)

    monkeypatch.setattr(TrainingStep, "__call__", call)
    yield taken


def test_resuming_repeats_no_step(data: Path, tmp_path: Path, steps_that_count: list[int]) -> None:
    train(tiny_train_config(data, steps=3), tmp_path)
    train(tiny_train_config(data, steps=5), tmp_path, resume=True)
    assert len(steps_that_count) == 5


@pytest.mark.parametrize("place", [0, 900, -2])
def test_a_corpus_of_equal_length_is_not_the_same_corpus(
    data: Path, tmp_path: Path, place: int
) -> None:
    text, run = tmp_path / "text.txt", tmp_path / "run"
    content = bytearray(data.read_bytes())
    text.write_bytes(content)
    config = tiny_train_config(text, steps=3)
    train(config, run)
    # the same text somewhere else
    train(tiny_train_config(data, steps=4), run, resume=True)
    content[place] ^= 1
    text.write_bytes(content)
    with pytest.raises(UserError, match="resume: the data has changed since"):
        make_trainer(config, run, resume=True)
