"""``fastgpt2 plot``: runs compared in one picture."""

import re
from pathlib import Path
from typing import Any

import pytest

from fastgpt2 import runs
from fastgpt2.__main__ import main as fastgpt2
from fastgpt2.picture import new_figure
from fastgpt2.plot import main
from fastgpt2.train.curves import Curves, paint_runs
from fastgpt2.train.metrics import MetricsLog, read_metrics


def make_run(folder: Path, factor: float = 1.0, steps: int = 30) -> Path:
    folder.mkdir(parents=True)
    (folder / runs.RUN_CONFIG).write_text("", encoding="utf-8")
    log = MetricsLog(folder)
    for step in range(1, steps + 1):
        place: dict[str, float] = dict(step=step, tokens=64 * step, elapsed=step * factor)
        log.write(**place, train_loss=factor * 3 / step, lr=1e-3 / step, grad_norm=1.0 + factor)
        log.write(**place, tokens_per_second=1e3 / factor)
        if step % 10 == 0:
            log.write(**place, val_loss=factor * 4 / step)
    return folder


def panels(*curves: Curves) -> dict[tuple[str, str], Any]:
    """The panels by what they show, up and across."""
    return {(axes.get_ylabel(), axes.get_xlabel()): axes for axes in paint_runs(curves).axes}


def test_every_panel_shows_what_it_says(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", 10.0)]
    records = [read_metrics(folder) for folder in folders]
    found = panels(*(Curves(f.name, r) for f, r in zip(folders, records, strict=True)))
    loss = "cross-entropy (nats per token)"
    assert set(found) == {
        *((loss, x) for x in ("tokens", "optimizer step", "minutes")),
        *((y, "optimizer step") for y in ("learning rate", "gradient norm", "tokens / s")),
    }
    # training and validation of two runs; a minute is 60 seconds
    for (y, x), axes in found.items():
        lines = [line for line in axes.get_lines() if len(line.get_xdata())]
        assert len(lines) == (4 if y == loss else 2), (y, x)
    last = found[loss, "minutes"].get_lines()[-1]
    assert list(last.get_xdata()) == pytest.approx([100 / 60, 200 / 60, 300 / 60])
    assert list(last.get_ydata()) == pytest.approx([4.0, 2.0, 40 / 30])
    assert list(found[loss, "tokens"].get_lines()[0].get_xdata()) == [64 * i for i in range(1, 31)]
    norms = found["gradient norm", "optimizer step"].get_lines()
    assert {*norms[0].get_ydata()} == {2.0} and {*norms[1].get_ydata()} == {11.0}
    # one colour for a run, another for the next
    colours = [line.get_color() for line in norms]
    assert colours[0] != colours[1]
    ticks = found[loss, "tokens"].xaxis.get_major_formatter()
    assert [ticks(x) for x in (0, 50_000, 1_200_000)] == ["0", "50k", "1.2M"]


@pytest.mark.parametrize(("name", "start"), [("out.png", b"\x89PNG"), ("out.SVG", b"<?xml")])
def test_the_command_writes_the_picture(
    tmp_path: Path, name: str, start: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make_run(tmp_path / "cost $1_{x$", 1.0), make_run(tmp_path / "b" / "zwei", 2.0)]
    out = tmp_path / name
    assert fastgpt2(["plot", *map(str, folders), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(start)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        "cost $1_{x$: 30 steps, 1,920 tokens, 30 s; best validation loss 0.1333, at step 30"
    )
    assert said[1].startswith("zwei: ") and said[2] == f"picture: {out}"


def test_runs_of_one_name_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make_run(tmp_path / name / "run", steps=1) for name in ("a", "b")]
    out = tmp_path / "out.svg"
    assert main([*map(str, folders), f"--out={out}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in said[:2]] == [str(folder) for folder in folders]


@pytest.mark.parametrize(
    ("name", "out", "message"),
    [
        ("nowhere", "x.png", "nowhere: not a run folder"),
        ("empty", "x.png", "empty: the run has measured nothing yet"),
        ("run", "x.jpg", r"x.jpg: the name of the picture must end in .png or .svg"),
        ("run", "run/config.toml/x.png", "x.png: not drawn"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    tmp_path: Path, name: str, out: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", steps=1)
    make_run(tmp_path / "empty", steps=0)
    assert main([str(tmp_path / name), f"--out={tmp_path / out}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not list(tmp_path.glob("x.*"))


def test_records_with_little_in_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=0)
    MetricsLog(folder).write(step=1)
    assert main([str(folder), f"--out={tmp_path / 'x.png'}"]) == 0


def test_a_run_that_exploded_is_one_line_at_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    folder = make_run(tmp_path / "run", steps=0)
    log = MetricsLog(folder)
    for step, loss in enumerate((1e308, -1e308), start=1):
        log.write(step=step, train_loss=loss, val_loss=loss, elapsed=-3.0)
    assert main([str(folder), f"--out={tmp_path / 'x.png'}"]) in (0, 2)
    assert len(capsys.readouterr().err.splitlines()) <= 1
    assert not [str(w.message) for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_numbers_that_are_none_end_the_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgpt2.plot.paint_runs", lambda _: new_figure(0.2, 0.2))
    folder = make_run(tmp_path / "run", steps=3)
    capsys.readouterr()
    for damage in ('{"step": 4, "val_loss": "x"}', '{"step": 4, "elapsed": Infinity}'):
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(damage + "\n")
        assert main([str(folder), f"--out={tmp_path / 'x.png'}"]) == 0
        assert capsys.readouterr().out.startswith("run: 3 steps, ")
