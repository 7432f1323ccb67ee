import csv
import json
import math
from pathlib import Path

import pytest

from fastgpt2.train.metrics import COLUMNS, MetricsLog, plot, read_metrics


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def csv_records(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_one_json_object_a_line_and_the_same_as_csv(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(step=1, tokens=64, train_loss=2.5, lr=1e-3, grad_norm=0.1 + 0.2, mfu=None)
    log.write(step=2, val_loss=2.0, val_perplexity=math.inf, train_loss=math.nan)
    expected = [
        {"step": 1, "tokens": 64, "train_loss": 2.5, "lr": 1e-3, "grad_norm": 0.1 + 0.2},
        {"step": 2, "val_loss": 2.0},
    ]
    assert [json.loads(line) for line in lines(tmp_path / "metrics.jsonl")] == expected
    assert read_metrics(tmp_path) == expected
    assert lines(tmp_path / "metrics.csv")[0] == ",".join(COLUMNS)
    assert csv_records(tmp_path) == expected


def test_a_column_nobody_knows_is_our_fault(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        MetricsLog(tmp_path).write(step=1, loss=2.0)


def test_resuming_drops_what_came_after(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in range(1, 6):
        log.write(step=step, train_loss=float(step))
    MetricsLog(tmp_path, step=3).write(step=4, train_loss=40.0)
    expected = [{"step": s, "train_loss": loss} for s, loss in ((1, 1), (2, 2), (3, 3), (4, 40))]
    assert read_metrics(tmp_path) == expected
    assert csv_records(tmp_path) == expected


@pytest.mark.parametrize(
    "tail",
    [
        *(b'{"step": 3, "tra', b"[3]\n", b'{"loss": 3}\n', b"\xff\xfe\n", b'{"step": true}'),
        *(b'{"step": 3, "tokens": %s}' % value for value in (b'"x"', b"null", b"[1]")),
        b'{"step": 1%s}' % (b"0" * 400),
    ],
)
def test_a_damaged_end_is_left_out(tmp_path: Path, tail: bytes) -> None:
    MetricsLog(tmp_path).write(step=2, train_loss=2.0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert read_metrics(tmp_path) == [{"step": 2, "train_loss": 2.0}]
    MetricsLog(tmp_path, step=9)
    assert lines(tmp_path / "metrics.jsonl") == ['{"step": 2, "train_loss": 2.0}']


def test_picture(tmp_path: Path) -> None:
    assert not plot(tmp_path)
    log = MetricsLog(tmp_path)
    assert not plot(tmp_path)
    for step in range(1, 20):
        log.write(step=step, train_loss=3 / step, lr=1e-3, tokens_per_second=100.0)
    log.write(step=19, val_loss=1.0)
    path = tmp_path / "loss.png"
    assert plot(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {"loss.png", "metrics.csv", "metrics.jsonl"}


@pytest.mark.parametrize(
    "record", [{"step": 1, "val_loss": 1.0}, {"step": 1, "lr": 1.0}, {"step": 0}]
)
def test_picture_of_very_little(tmp_path: Path, record: dict[str, float]) -> None:
    MetricsLog(tmp_path).write(**record)
    assert plot(tmp_path)


def test_a_number_that_is_not_finite_ends_nothing(tmp_path: Path) -> None:
    """Other programs, and Python's json, write NaN; what comes after such a line counts."""
    lines_ = ['{"step": 1, "val_loss": NaN}', '{"step": 2, "val_loss": Infinity, "lr": 0.5}']
    lines_ += ['{"step": 3, "val_loss": 2.0, "elapsed": 1e999}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines_) + "\n", encoding="utf-8")
    expected = [{"step": 1}, {"step": 2, "lr": 0.5}, {"step": 3, "val_loss": 2.0}]
    assert read_metrics(tmp_path) == expected
    assert plot(tmp_path)
    # a resumed run keeps them
    MetricsLog(tmp_path, step=3)
    assert [json.loads(line) for line in lines(tmp_path / "metrics.jsonl")] == expected
    assert csv_records(tmp_path) == expected
