"""A checkpoint is a copy, written by a thread while training goes on."""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgpt2 import runs
from fastgpt2.errors import EndedElsewhere, UserError
from fastgpt2.train import checkpoint
from fastgpt2.train.saver import Saver
from tests.tiny_gpt import gradients, tiny_batch, tiny_gpt
from tests.train.tiny_run import make_trainer, tiny_train_config


def test_what_was_copied_does_not_change(tmp_path: Path) -> None:
    model = tiny_gpt()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    gradients(model, *tiny_batch())
    optimizer.step()
    folder = checkpoint.save(tmp_path / "now", 1, model, optimizer, {})
    write = checkpoint.staged(tmp_path / "later", 1, model, optimizer, {})
    gradients(model, *tiny_batch(seed=1))
    optimizer.step()
    torch.manual_seed(5)
    write()
    for name in (runs.MODEL, runs.OPTIMIZER):
        expected = load_file(folder / name)
        found = load_file(runs.step_folder(tmp_path / "later", 1) / name)
        assert found.keys() == expected.keys()
        assert all(found[key].equal(expected[key]) for key in expected)


@pytest.mark.usefixtures("no_picture")
def test_training_goes_on_while_a_checkpoint_is_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint's writer waits for a later step, which waits for nothing."""
    later = threading.Event()
    threads: set[str] = set()
    trainer = make_trainer(tiny_train_config(data, steps=4, eval_every=2), tmp_path / "run")
    whole, write = type(trainer.training_step).__call__, checkpoint._write

    def slow_write(*arguments: object) -> None:
        threads.add(threading.current_thread().name)
        assert later.wait(20)
        write(*arguments)  # type: ignore[arg-type]

    def step(*arguments: object) -> object:
        if trainer.state.step == 3:
            assert runs.saved_steps(tmp_path / "run") == []
            later.set()
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "_write", slow_write)
    monkeypatch.setattr(type(trainer.training_step), "__call__", step)
    trainer.run()
    assert threads == {"saver"}
    assert runs.saved_steps(tmp_path / "run") == [2, 4]


@pytest.mark.usefixtures("no_picture")
def test_a_checkpoint_that_fails_ends_the_run_at_the_next_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_train_config(data, steps=6, eval_every=2), tmp_path / "run")
    failed = threading.Event()
    take = trainer._take

    def full(*_: object, **__: object) -> None:
        failed.set()
        raise OSError(28, "No space left on device")

    def take_after_failure() -> object:
        if trainer.state.step == 2:
            assert failed.wait(20)
            trainer.state.saver._thread.join()  # type: ignore[union-attr]
        return take()

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    monkeypatch.setattr(trainer, "_take", take_after_failure)
    with pytest.raises(UserError, match=r"step_00000002: cannot be written: .*No space left"):
        trainer.run()
    assert trainer.state.step == 2
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_an_error_is_raised_once() -> None:
    def fail() -> None:
        raise UserError("full")

    saver = Saver()
    saver.begin(fail, aside=False)
    with pytest.raises(UserError, match="full"):
        saver.wait()
    saver.wait()
    saver.look()


def test_an_error_of_another_process_is_left_to_it() -> None:
    def fail() -> None:
        raise EndedElsewhere(2)

    saver = Saver()
    saver.begin(fail, aside=False)
    for _ in range(50):
        saver.look()
        time.sleep(0.001)
    with pytest.raises(EndedElsewhere):
        saver.wait()


@pytest.mark.parametrize(("error", "waits"), [(ValueError, True), (KeyboardInterrupt, False)])
def test_an_error_waits_and_a_second_signal_does_not(
    error: type[BaseException], waits: bool
) -> None:
    go_on = threading.Event()
    done: list[bool] = []

    def work() -> None:
        go_on.wait(20)
        done.append(True)

    saver = Saver()
    timer = threading.Timer(0.05, go_on.set)
    with pytest.raises(error), saver:
        saver.begin(work, aside=False)
        if waits:
            timer.start()
        raise error
    assert bool(done) == waits
    go_on.set()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities on Linux alone")
@pytest.mark.parametrize("aside", [True, False])
def test_a_thread_that_writes_much_lets_others_go_first(aside: bool) -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    found: list[int] = []
    saver, before = Saver(), niceness()
    saver.begin(lambda: found.append(niceness()), aside=aside)
    saver.wait()
    assert found == [19 if aside else before] and niceness() == before


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("many", [1, 10**9])
def test_a_run_with_many_weights_writes_aside(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    found: set[bool] = set()
    begin = Saver.begin

    def watched(self: Saver, work: Callable[[], None], *, aside: bool) -> None:
        found.add(aside)
        begin(self, work, aside=aside)

    monkeypatch.setattr(Saver, "begin", watched)
    monkeypatch.setattr("fastgpt2.train.state._MANY", many)
    make_trainer(tiny_train_config(data, steps=1), tmp_path / "run").run()
    assert found == {many == 1}


@pytest.mark.parametrize("fault", ["no priorities", "no threads"])
def test_what_the_system_refuses_loses_no_checkpoint(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def refuse(*_: object) -> None:
        if fault == "no threads":
            raise RuntimeError("can't start new thread")
        raise PermissionError(1, "Operation not permitted")

    if fault == "no threads":
        monkeypatch.setattr(threading.Thread, "start", refuse)
    else:
        monkeypatch.setattr(os, "setpriority", refuse, raising=False)
    done: list[int] = []
    saver = Saver()
    saver.begin(lambda: done.append(1), aside=True)
    saver.wait()
    assert done == [1]

    def fail() -> None:
        raise UserError("full")

    # it is said where the others are
    saver.begin(fail, aside=True)
    with pytest.raises(UserError, match="full"):
        saver.wait()
