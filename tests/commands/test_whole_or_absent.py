"""``prepare``, ``convert``, ``evaluate``, ``plot`` under every fault: whole files or none.

A command, or another way of writing, is a line of ``COMMANDS`` and what ``case`` returns for it.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from fastgpt2 import streams
from fastgpt2.config import GPTConfig
from fastgpt2.convert import main as convert
from fastgpt2.evaluate import report
from fastgpt2.evaluate.__main__ import main as evaluate
from fastgpt2.picture import new_figure
from fastgpt2.plot import main as plot
from fastgpt2.prepare import main as prepare
from fastgpt2.text import build_dataset
from fastgpt2.weights import load, save
from tests.faults import SIGNALS, BreakingStream, failing_disk, signalling_disk
from tests.weights.conftest import random_checkpoint, same_bits

# what a command writes, and what proves that it is whole
Command = Callable[[Path], int]
Check = Callable[[Path], None]
SMALL = GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=8, gelu="tanh")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_checkpoint(SMALL), tmp_path_factory.mktemp("model") / "openai", "openai")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of a run that ``plot`` reads."""
    run = tmp_path_factory.mktemp("runs") / "run"
    run.mkdir()
    (run / "config.toml").write_text("steps = 1\n", encoding="utf-8")
    (run / "metrics.jsonl").write_text('{"step": 1, "train_loss": 2.5}\n', encoding="utf-8")
    return run


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is how files are written, not what six panels show."""
    for name in ("draw_text_scores", "draw_metrics"):
        monkeypatch.setattr(report, name, lambda *_: True)
    monkeypatch.setattr("fastgpt2.plot.paint_runs", lambda _: new_figure(0.2, 0.2))
    # bars are shown from the beginning, and may fail
    monkeypatch.setattr(streams, "BAR_DELAY", 0.0)


def ids(folder: Path) -> list[list[int]]:
    data = build_dataset(str(folder), tokenizer="bytes")
    assert data.val is not None
    return [split[:].tolist() for split in (data.train, data.val)]


def prepared(text: Path, out: Path, to: str = "fastgpt2") -> int:
    flags = ["--workers=1", "--val-fraction=0.5", "--shard-tokens=600", "--tokenizer=bytes"]
    return prepare(["--data", str(text), "--out", str(out), "--to", to, *flags])


def in_parts(text: Path, out: Path) -> int:
    flags = ["--workers=1", "--val-fraction=0.5", "--shard-tokens=600", "--tokenizer=bytes"]
    code = prepare(["--data", str(text), "--out", str(out), "--part=1/1", *flags])
    return code or prepare(["--merge", "--out", str(out)])


def converted(model: Path, out: Path, to: str, *flags: str) -> int:
    return convert([str(model), str(out), "--to", to, *flags])


def plotted(run: Path, out: Path, kind: str) -> int:
    return plot([str(run), "--out", str(out / f"runs.{kind}")])


def evaluated(model: Path, data: Path, out: Path, task: str) -> int:
    flags = ["--tokenizer=bytes", "--device=cpu", "--limit=20", f"--task={task}"]
    return evaluate([str(model), "--data", str(data), "--out", str(out), *flags])


COMMANDS = {
    **{f"prepare {to}": to for to in ("fastgpt2", "llmc", "nanogpt")},
    "prepare in parts": "parts",
    **{f"convert {to}": to for to in ("hf", "nanogpt", "llmc", "openai", "fastgpt2")},
    "convert int8": "int8",
    "evaluate": "text",
    "evaluate task": "lambada",
    **{f"plot {kind}": kind for kind in ("png", "svg")},
}
# one for each way of writing
FEW = [
    *("prepare fastgpt2", "prepare in parts", "convert nanogpt", "convert fastgpt2"),
    *("evaluate", "plot png"),
]


@pytest.fixture(params=COMMANDS)
def case(
    request: pytest.FixtureRequest, data: str, model: Path, run_folder: Path, tmp_path: Path
) -> tuple[str, Command, Check]:
    """Name, the command with everything but the place of its result, the check of that."""
    kind, to, text = request.param.split()[0], COMMANDS[request.param], Path(data)
    if kind == "evaluate":
        if to != "text":
            text = tmp_path / "task.jsonl"
            text.write_text('{"text": "the last word"}\n', encoding="utf-8")
        command = partial(evaluated, model, text, task=to)
        assert command(tmp_path / "sound") == 0
        files = {path.name: path.read_bytes() for path in (tmp_path / "sound").iterdir()}

        def same_report(out: Path) -> None:
            assert all(path.read_bytes() == files[path.name] for path in out.iterdir())

        return kind, command, same_report
    if kind == "plot":

        def whole_picture(out: Path) -> None:
            (picture,) = out.iterdir()
            begin, end = {"png": (b"\x89PNG", b"IEND\xaeB`\x82"), "svg": (b"<?xml", b"</svg>\n")}[
                to
            ]
            content = picture.read_bytes()
            assert content.startswith(begin) and content.endswith(end)

        return kind, partial(plotted, run_folder, kind=to), whole_picture
    if kind == "prepare":
        command = partial(in_parts, text) if to == "parts" else partial(prepared, text, to=to)
        assert prepared(text, tmp_path / "sound") == 0
        sound = ids(tmp_path / "sound")

        def same_ids(out: Path) -> None:
            assert ids(out) == sound

        return kind, command, same_ids
    flags = ["--quantize=int8"] if to == "int8" else []
    to = "fastgpt2" if flags else to
    assert converted(model, tmp_path / "sound", to, *flags) == 0

    def same_model(out: Path) -> None:
        assert same_bits(load(out), load(tmp_path / "sound"))

    return kind, lambda out: converted(model, out, to, *flags), same_model


def assert_recovers(command: Command, out: Path, check: Check) -> None:
    """Nothing temporary is left; what has its final name is whole, or parts that go on."""
    assert not list(out.parent.rglob(".*.tmp"))
    if (out / "prepare-parts").exists() and not (out / "manifest.json").exists():
        assert command(out) == 0
    if out.exists() and any(out.iterdir()):
        check(out)


def test_a_disk_that_fails_at_any_write(
    case: tuple[str, Command, Check], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, command, check = case
    failed = 0
    for n in range(1, 500):
        out = tmp_path / str(n) / "out"
        out.parent.mkdir()
        capsys.readouterr()
        # full from here on, or once broken
        number, lasts = ((errno.ENOSPC, True), (errno.EIO, False))[n % 2]
        with failing_disk(n, out.parent, lasts=lasts, number=number) as fault:
            code = command(out)
        said = [x for x in capsys.readouterr().err.splitlines() if "error: " in x]
        if not fault.happened:
            break
        if code == 0:
            # a link that fails is replaced by a copy
            check(out)
            continue
        assert (code, len(said)) == (2, 1), (n, said)
        assert said[0].startswith(f"fastgpt2 {kind}: error: ") and os.strerror(number) in said[0]
        assert_recovers(command, out, check)
        failed += 1
    assert code == 0
    check(out)
    assert failed > 4


@pytest.mark.parametrize("case", FEW, indirect=True)
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_terminal_that_goes_away_at_any_line(
    case: tuple[str, Command, Check], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kind, command, check = case
    for n in range(1, 50):
        stream = BreakingStream(n)
        out = tmp_path / str(n)
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, stream)
            assert command(out) == 0
        check(out)
        if not stream.fault.happened:
            break
    assert n > 1 or (name == "stderr" and kind in ("evaluate", "plot"))


@pytest.mark.parametrize("case", FEW, indirect=True)
def test_a_signal_at_any_write(
    case: tuple[str, Command, Check], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, command, check = case
    for n in range(1, 200):
        name = SIGNALS[n % len(SIGNALS)]
        number = getattr(signal, name)
        before = signal.getsignal(number)
        out = tmp_path / str(n) / "out"
        out.parent.mkdir()
        capsys.readouterr()
        with signalling_disk(n, out.parent, number) as fault:
            code = command(out)
        assert signal.getsignal(number) is before
        if not fault.happened:
            break
        assert code == 128 + number, n
        said = "interrupted" if name == "SIGINT" else f"stopped by {name}"
        assert capsys.readouterr().err.splitlines()[-1] == f"fastgpt2 {kind}: {said}"
        assert_recovers(command, out, check)
    assert code == 0 and n > 4
