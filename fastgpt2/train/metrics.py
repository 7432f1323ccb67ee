"""What a run measures, as JSON lines, CSV and a picture."""

import csv
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgpt2.files import naming, parse_json, write_text
from fastgpt2.picture import draw, printable
from fastgpt2.train.curves import Curves, paint_run

# losses in nats per token, elapsed in seconds, mfu 0 to 1
COLUMNS = (
    "step",
    "tokens",
    "train_loss",
    "val_loss",
    "val_perplexity",
    "val_bits_per_byte",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "elapsed",
)


class MetricsLog:
    """``metrics.jsonl`` and ``metrics.csv``: one record per line, written at once.

    If the run resumes at ``step``, later records are dropped.
    """

    def __init__(self, run: Path, step: int = 0) -> None:
        self._json_path, self._csv_path = run / "metrics.jsonl", run / "metrics.csv"
        records = [r for r in read_metrics(run) if r["step"] <= step]
        write_text(self._json_path, "".join(json.dumps(record) + "\n" for record in records))
        write_text(self._csv_path, ",".join(COLUMNS) + "\n" + "".join(map(_csv_line, records)))

    def write(self, **record: float | None) -> dict[str, float]:
        """Append one record; None and non-finite values are left out. Returns what is kept."""
        unknown = set(record) - set(COLUMNS)
        assert not unknown, unknown
        kept = {k: v for k, v in record.items() if v is not None and math.isfinite(v)}
        for path, line in (
            (self._json_path, json.dumps(kept) + "\n"),
            (self._csv_path, _csv_line(kept)),
        ):
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        return kept


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run, up to the first damaged line: a crash can cut the last one off.

    A number that is not finite is left out of its record, as ``MetricsLog`` does.
    """
    path = run / "metrics.jsonl"
    with naming(path):
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    records: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            break
        if not isinstance(record, dict):
            break
        record = {name: value for name, value in record.items() if not _is_not_finite(value)}
        if type(record.get("step")) is not int:
            break
        if not all(_is_number(record.get(name, 0)) for name in COLUMNS):
            break
        records.append(record)
    return records


def _is_not_finite(value: Any) -> bool:
    """Whether it is NaN or an infinity, which JSON does not have and many programs write."""
    return isinstance(value, float) and not math.isfinite(value)


def _is_number(value: Any) -> bool:
    """Whether it is finite, and no truth value; an integer may be too large for a float."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _csv_line(record: dict[str, Any]) -> str:
    buffer = io.StringIO()
    csv.DictWriter(buffer, COLUMNS, lineterminator="\n").writerow(record)
    return buffer.getvalue()


def plot(run: Path, notify: Callable[[str], None] = print) -> bool:
    """Draw ``loss.png``: training and validation loss, learning rate, tokens per second.

    Args:
        run: the run folder.
        notify: shows the line that says why it was not drawn.

    Returns:
        Whether it was drawn; a run without records has nothing to draw yet.
    """
    path = run / "loss.png"
    try:
        records = read_metrics(run)
    except OSError as error:
        notify(f"{path.name}: not drawn ({error})")
        return False
    if not records:
        return False
    title = printable(run.absolute().name)
    return draw(path, lambda: paint_run(Curves(title, records)), notify=notify)
