"""Pictures are drawn whatever the environment says, and a failure is one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt2 import picture
from fastgpt2.train.metrics import MetricsLog, plot

SCRIPT = """
import sys
from pathlib import Path
from fastgpt2.train.metrics import plot
print(plot(Path(sys.argv[1])))
"""


def run_with_records(folder: Path) -> Path:
    log = MetricsLog(folder)
    for step in range(1, 4):
        log.write(step=step, train_loss=3 / step, lr=1e-3, tokens_per_second=100.0)
    return folder


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no-such", "qt"])
def test_a_hostile_environment_changes_nothing(tmp_path: Path, backend: str) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n", encoding="utf-8")
    folder = tmp_path / "cost $1_{x$ $\\bad$"
    folder.mkdir()
    run_with_records(folder)
    pythonpath = os.pathsep.join(os.path.abspath(p) for p in sys.path)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": backend, "PYTHONPATH": pythonpath},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (result.stdout, result.returncode) == ("True\n", 0), result.stderr
    expected = tmp_path / "plain" / folder.name
    expected.mkdir(parents=True)
    assert plot(run_with_records(expected))
    assert (folder / "loss.png").read_bytes() == (expected / "loss.png").read_bytes()


def test_half_a_character_in_a_name(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    assert plot(run_with_records(folder))


def test_a_failure_is_one_line(tmp_path: Path) -> None:
    said: list[str] = []

    def paint() -> None:
        raise RuntimeError("latex\nwas not found")

    assert not picture.draw(tmp_path / "loss.png", paint, notify=said.append)
    assert said == ["loss.png: not drawn (latex was not found)"]
    assert not list(tmp_path.iterdir())


def test_numbers_of_a_logarithmic_axis_are_plain() -> None:
    figure = picture.new_figure(2, 2)
    axes = figure.subplots()
    axes.set(yscale="log", ylim=(1, 1e7))
    picture.plain_numbers(axes)
    # how many ticks lie beyond the limits is the version's choice
    assert {"1", "1e+06"} <= {label.get_text() for label in axes.get_yticklabels()}
