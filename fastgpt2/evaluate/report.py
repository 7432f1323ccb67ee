"""What an evaluation writes: a JSON record, a table in Markdown, a picture."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgpt2.evaluate.perplexity import TextScore
from fastgpt2.evaluate.picture import draw_metrics, draw_text_scores
from fastgpt2.evaluate.tasks import Metrics
from fastgpt2.files import write_text

# how the evaluation was done: name -> value, one line each
Protocol = dict[str, str]


def text_table(scores: dict[str, TextScore]) -> str:
    """The scores on a text, one row per model."""
    rows = []
    for name, s in scores.items():
        words = "" if s.word_perplexity is None else f"{s.word_perplexity:,.2f}"
        row = (f"{s.context}", f"{s.stride}", f"{s.tokens_scored:,}", f"{s.bytes_scored:,}")
        numbers = (f"{s.loss:.4f}", f"{s.perplexity:,.2f}", f"{s.bits_per_byte:.4f}", words)
        rows.append((name, *row, *numbers))
    head = "model context stride tokens bytes nats/token perplexity bits/byte word-perplexity"
    return _markdown(head.split(), rows)


def task_table(results: dict[str, Metrics]) -> str:
    """Metrics with their standard errors, one row per model."""
    names = list(next(iter(results.values())))
    rows = [
        (model, *(f"{metrics[name].value:.4f} ± {metrics[name].stderr:.4f}" for name in names))
        for model, metrics in results.items()
    ]
    return _markdown(["model", *names], rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # a bar or the end of a line would end a cell
    cells = [[_on_one_line(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for number, row in enumerate(cells):
        first, *rest = (cell for cell in zip(row, widths, strict=True))
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        lines.append("| " + " | ".join(padded) + " |")
        if not number:
            rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
            lines.append("| " + " | ".join(rule) + " |")
    return "\n".join(lines)


def protocol_lines(protocol: Protocol) -> str:
    """One line per entry of the protocol."""
    return "\n".join(f"{key}: {_on_one_line(value)}" for key, value in protocol.items())


def write_text_report(folder: Path, protocol: Protocol, scores: dict[str, TextScore]) -> None:
    """Write ``evaluation.json``, ``evaluation.md`` and ``evaluation.png``."""
    _write(folder, protocol, {name: _text_record(s) for name, s in scores.items()})
    table = f"{text_table(scores)}\n\n" + "\n\n".join(
        f"## The worst predicted tokens of {name}\n\n{_worst_table(s)}"
        for name, s in scores.items()
    )
    _write_markdown(folder, protocol, table)
    draw_text_scores(folder / "evaluation.png", scores, protocol["data"])


def write_task_report(
    folder: Path, protocol: Protocol, results: dict[str, Metrics], chance: float
) -> None:
    """Write ``evaluation.json``, ``evaluation.md`` and ``evaluation.png``."""
    records = {
        model: {name: {"value": m.value, "stderr": m.stderr} for name, m in metrics.items()}
        for model, metrics in results.items()
    }
    _write(folder, protocol, records)
    _write_markdown(folder, protocol, task_table(results))
    draw_metrics(folder / "evaluation.png", results, protocol["task"], chance)


def _text_record(score: TextScore) -> dict[str, Any]:
    position, calibration = score.position, score.calibration
    return {
        "context": score.context,
        "stride": score.stride,
        "tokens": score.tokens,
        "tokens_scored": score.tokens_scored,
        "bytes_scored": score.bytes_scored,
        "words": score.words,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "word_perplexity": score.word_perplexity,
        "calibration_error": score.calibration_error,
        # index: number of tokens read before, minus one
        "position_count": position[0].tolist(),
        "position_loss_sum": position[1].tolist(),
        "calibration_count": calibration[0].tolist(),
        "calibration_confidence_sum": calibration[1].tolist(),
        "calibration_correct": calibration[2].tolist(),
        "worst_tokens": [vars(token) for token in score.worst],
    }


def _worst_table(score: TextScore) -> str:
    rows = [
        (f"`{_visible(w.token)}`", f"{w.nll:.2f}", f"{w.place:,}", f"`{_visible(w.before)}`")
        for w in score.worst
    ]
    return _markdown(("token", "nats", "place", "after"), rows)


def _visible(text: str) -> str:
    """The text on one line, without the backquote that ends code in Markdown."""
    return _on_one_line(text).replace("`", "'").replace("\t", "\\t")


def _on_one_line(text: str) -> str:
    """With escapes for line breaks, which the name of a file may hold."""
    return text.replace("\r", "\\r").replace("\n", "\\n")


def _write(folder: Path, protocol: Protocol, records: dict[str, Any]) -> None:
    content = _finite({"protocol": protocol, "models": records})
    write_text(folder / "evaluation.json", json.dumps(content, indent=1, allow_nan=False) + "\n")


def _write_markdown(folder: Path, protocol: Protocol, table: str) -> None:
    lines = "\n".join(f"- {line}" for line in protocol_lines(protocol).splitlines())
    write_text(folder / "evaluation.md", f"# Evaluation\n\n{lines}\n\n{table}\n")


def _finite(value: Any) -> Any:
    """``value`` with null for infinity and NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
