"""A small run under every fault at every place: nothing is lost, and one line says why."""

import errno
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastgpt2 import runs, streams
from fastgpt2.train import checkpoint
from fastgpt2.train.__main__ import main
from fastgpt2.train.console import Console
from tests.faults import SIGNALS, BreakingStream, failing_disk, signal_at
from tests.train.tiny_run import measured, saved_tensors

pytestmark = pytest.mark.usefixtures("no_picture")

SHAPE = "--tokenizer=bytes --model=gpt2-nano --block-size=8 --n-layer=1 --n-head=1 --n-embd=8"
LENGTH = "--batch-size=2 --steps=3 --warmup-steps=1 --log-every=1 --eval-every=2 --keep-last=1"
FLAGS = [*SHAPE.split(), *LENGTH.split(), "--device=cpu", "--sample-tokens=2"]


@pytest.fixture(autouse=True)
def bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are shown from the beginning, and may fail."""
    monkeypatch.setattr(streams, "BAR_DELAY", 0.0)


def begin(data: Path, run: Path) -> int:
    return main(["--data", str(data), "--out", str(run), *FLAGS])


def finish(data: Path, run: Path) -> int:
    """Resume, or begin again where no checkpoint was reached."""
    if run.exists() and runs.saved_steps(run):
        return main(["--resume", "--out", str(run)])
    again = ["--overwrite"] if runs.is_run(run) else []
    return main(["--data", str(data), "--out", str(run), *FLAGS, *again])


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("short") / "text.txt"
    path.write_text("".join(f"{i} cats\n" for i in range(20)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def sound(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("sound") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastgpt2.train.trainer.plot", lambda *_: True)
        assert begin(short, run) == 0
    return run


def assert_sound(run: Path, sound: Path) -> None:
    ours, theirs = saved_tensors(run), saved_tensors(sound)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert ours.keys() == theirs.keys()


def assert_nothing_half(run: Path) -> None:
    """No temporary file is left, and what has a checkpoint's name is one."""
    left = [path for path in run.rglob(".*")] if run.exists() else []
    assert not left
    for step in runs.saved_steps(run):
        checkpoint.load_model(runs.step_folder(run, step))


def what_is_left(run: Path) -> object:
    """All that the next start of a run finds, without what the clock says."""
    files = tuple(sorted(str(path.relative_to(run)) for path in run.rglob("*")))
    return files, str(measured(run)) if run.exists() else ""


@pytest.mark.parametrize("lasts", [False, True])
def test_a_disk_that_fails_at_any_write(
    short: Path, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lasts: bool
) -> None:
    failed, finished = 0, set[object]()
    for n in range(1, 500):
        run = tmp_path / str(n)
        with failing_disk(n, run, lasts=lasts) as fault:
            code = begin(short, run)
        said = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
        if not fault.happened:
            break
        # making a folder that is there already may fail
        if code == 0:
            assert_sound(run, sound)
            continue
        assert (code, len(said)) == (2, 1), n
        assert "No space left on device" in said[0]
        assert_nothing_half(run)
        failed += 1
        left = what_is_left(run)
        if left not in finished:
            finished.add(left)
            before = runs.saved_steps(run)
            assert finish(short, run) == 0
            assert runs.saved_steps(run)[-1] == 3 >= max(before, default=0)
            assert_sound(run, sound)
    assert code == 0
    assert failed > 20 and len(finished) > 4


# `train ... | tee log`, and a terminal that is closed
@pytest.mark.parametrize(("name", "number"), [("stdout", errno.EPIPE), ("stderr", errno.EIO)])
def test_a_terminal_that_goes_away_at_any_line(
    short: Path,
    sound: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    number: int,
) -> None:
    for n in range(1, 500):
        stream = BreakingStream(n, number)
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, stream)
            assert begin(short, tmp_path / str(n)) == 0
            assert getattr(sys, name) is stream
        assert_sound(tmp_path / str(n), sound)
        assert measured(tmp_path / str(n)) == measured(sound)
        if not stream.fault.happened:
            break
    assert n > 2


POINTS = (
    "fastgpt2.train.step.TrainingStep.__call__",
    "fastgpt2.train.trainer.validate",
    "fastgpt2.train.checkpoint.staged",
    "fastgpt2.train.checkpoint._write",
    "fastgpt2.train.checkpoint.prune",
    "fastgpt2.train.samples.stream_text",
)


# one handler serves all signals: each place with one of them, and the first place with all
@pytest.mark.parametrize(
    ("point", "name"),
    [
        *((POINTS[0], name) for name in SIGNALS),
        *((point, SIGNALS[i % len(SIGNALS)]) for i, point in enumerate(POINTS[1:])),
    ],
)
def test_a_signal_at_any_place(
    short: Path, sound: Path, tmp_path: Path, point: str, name: str
) -> None:
    number = getattr(signal, name)
    for n in range(1, 9):
        run = tmp_path / str(n)
        with signal_at(point, n, number) as fault:
            code = begin(short, run)
        if not fault.happened:
            break
        # the last evaluation may end the run before the signal is asked for
        assert code in (128 + number, 0)
        assert runs.saved_steps(run)
        assert_nothing_half(run)
        assert finish(short, run) == 0
        assert_sound(run, sound)
        assert measured(run) == measured(sound)
    assert n > 1


def test_an_ignored_signal_stays_ignored(short: Path, sound: Path, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signal_at("fastgpt2.train.trainer.validate", 1, signal.SIGHUP) as fault:
            assert begin(short, tmp_path / "run") == 0
        assert fault.happened
    finally:
        signal.signal(signal.SIGHUP, before)
    assert_sound(tmp_path / "run", sound)


def test_sigusr1_saves_and_goes_on(short: Path, sound: Path, tmp_path: Path) -> None:
    saved: list[int] = []
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        whole = checkpoint.staged

        def staged(*arguments: Any) -> Callable[[], None]:
            saved.append(arguments[1])
            return whole(*arguments)

        patch.setattr(checkpoint, "staged", staged)
        with signal_at("fastgpt2.train.step.TrainingStep.__call__", 1, signal.SIGUSR1):
            assert begin(short, run) == 0
    # the first step had no checkpoint of its own
    assert saved == [1, 2, 3]
    assert_sound(run, sound)


def test_what_is_shown_has_been_saved(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal may block as well as fail: whoever reads a line may count on what it says."""
    events: list[str] = []
    run = tmp_path / "run"
    staged, write = checkpoint.staged, Console.write

    def stage(*arguments: Any) -> Callable[[], None]:
        events.append(f"save {arguments[1]}")
        return staged(*arguments)

    def show(self: Console, text: str) -> None:
        events.append(text)
        if text.startswith("stopped"):
            # and not only begun
            assert 3 in runs.saved_steps(run)
        write(self, text)

    monkeypatch.setattr(checkpoint, "staged", stage)
    monkeypatch.setattr(Console, "write", show)
    with signal_at("fastgpt2.train.trainer.validate", 2, signal.SIGTERM):
        assert begin(short, run) == 128 + signal.SIGTERM
    saves = [event for event in events if event.startswith("save")]
    evaluation = next(event for event in events if event.startswith("step 2: validation loss"))
    assert saves[0] == "save 2" and events.index("save 2") < events.index(evaluation)
    assert events[-1] == "stopped by SIGTERM: step 3 is saved" and events[-2] == "save 3"
