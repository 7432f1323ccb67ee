"""The curves of runs, painted for ``fastgpt2.picture``: one run's ``loss.png``, or several runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastgpt2.picture import new_figure, short_numbers

# a record of metrics.jsonl
Record = dict[str, Any]

_LOSS = "cross-entropy (nats per token)"
_MARKERS: dict[str, Any] = dict(linewidth=1.2, markersize=4)
# seconds in a unit, and its name; the longest run decides
_UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


@dataclass(frozen=True)
class Curves:
    """What one run measured.

    Attributes:
        name: for the legend, printable.
        records: the records in the order of their steps.
    """

    name: str
    records: Sequence[Record]


def paint_run(curves: Curves) -> Any:
    """Training and validation loss, learning rate and tokens per second against the step."""
    figure = new_figure(8, 8)
    loss, lr, speed = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    for axes, key, label, style in (
        (loss, "train_loss", "training", "-"),
        (loss, "val_loss", "validation", "o-"),
        (lr, "lr", None, "-"),
        (speed, "tokens_per_second", None, "-"),
    ):
        _line(axes, curves.records, "step", key, style, label=label, **_MARKERS)
    if loss.has_data():
        loss.legend()
    for axes, label in ((loss, _LOSS), (lr, "learning rate"), (speed, "tokens / s")):
        _finish(axes, label)
    speed.set_ylim(bottom=0)
    speed.set_xlabel("optimizer step")
    loss.set_title(curves.name)
    figure.align_ylabels()
    return figure


def paint_runs(runs: Sequence[Curves]) -> Any:
    """Loss against tokens, steps and time; learning rate, gradient norm and tokens per second.

    Training losses are thin, validation losses have dots; a run has one colour.
    """
    figure = new_figure(14, 8.5)
    panels = figure.subplots(2, 3)
    longest = max((r.get("elapsed", 0.0) for run in runs for r in run.records), default=0.0)
    seconds, unit = next((u for u in _UNITS if longest >= 2 * u[0]), _UNITS[-1])
    across = (("tokens", "tokens"), ("step", "optimizer step"), ("elapsed", unit))
    down = (("lr", "learning rate"), ("grad_norm", "gradient norm"))
    for number, run in enumerate(runs):
        colour = f"C{number % 10}"
        for axes, (x, _) in zip(panels[0], across, strict=True):
            scale = seconds if x == "elapsed" else 1.0
            thin: dict[str, Any] = dict(color=colour, scale=scale)
            _line(axes, run.records, x, "train_loss", "-", alpha=0.45, linewidth=0.9, **thin)
            _line(axes, run.records, x, "val_loss", "o-", **_MARKERS, **thin)
        for axes, y in zip(panels[1], ("lr", "grad_norm", "tokens_per_second"), strict=True):
            _line(axes, run.records, "step", y, "-", color=colour, linewidth=1.2)
        # an empty line that only puts the run's name into the legend
        panels[0][0].plot([], [], "o-", color=colour, label=run.name, **_MARKERS)
    for axes, (_, label) in zip(panels[0], across, strict=True):
        _finish(axes, _LOSS)
        axes.set_xlabel(label)
    for axes, (_, label) in zip(panels[1], (*down, ("", "tokens / s")), strict=True):
        _finish(axes, label)
        axes.set_xlabel("optimizer step")
    short_numbers(panels[0][0])
    panels[1][2].set_ylim(bottom=0)
    said = "dots: validation, thin: training"
    columns = min(3, len(runs))
    figure.legend(loc="outside upper center", ncols=columns, fontsize=9, title=said)
    return figure


def _line(
    axes: Any,
    records: Sequence[Record],
    x: str,
    y: str,
    style: str,
    *,
    scale: float = 1.0,
    **options: Any,
) -> None:
    """Draw ``y`` against ``x / scale`` where a record has both."""
    points = [(r[x] / scale, r[y]) for r in records if x in r and y in r]
    if points:
        axes.plot(*zip(*points, strict=True), style, **options)


def _finish(axes: Any, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
