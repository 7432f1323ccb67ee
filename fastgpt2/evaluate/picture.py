"""Pictures of an evaluation, several models side by side."""

from pathlib import Path
from typing import Any

import numpy as np

from fastgpt2.evaluate.perplexity import TextScore
from fastgpt2.evaluate.tasks import Metrics
from fastgpt2.picture import draw, new_figure, printable

# points of the loss curve, and the fewest tokens that one point averages
_POINTS, _LEAST_TOKENS = 32, 30
# characters shown of the text before a token, and of a model's name
_SHOWN, _NAME = 44, 32
# Okabe and Ito's colours, which colour-blind people can tell apart; the markers help, too
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = "os^Dv*P"


def draw_text_scores(path: Path, scores: dict[str, TextScore], data: str) -> None:
    """Loss by position in the context, calibration, and each model's worst tokens."""
    draw(path, lambda: _paint_text_scores(scores, data))


def _paint_text_scores(scores: dict[str, TextScore], data: str) -> Any:
    columns = max(2, min(3, len(scores)))
    rows = -(-len(scores) // columns) if len(scores) > 1 else 1
    figure = new_figure(6.5 * columns, 4.6 + 3.4 * rows)
    top, bottom = figure.subfigures(2, 1, height_ratios=[4.6, 3.4 * rows])
    top.suptitle(f"cross-entropy of {printable(data)}")
    position, calibration = top.subplots(1, 2, width_ratios=[3, 2])
    for number, (name, score) in enumerate(scores.items()):
        style = _style(number)
        _draw_position(position, score, f"{_short(name)}: {score.loss:.4f} nats", style)
        _draw_calibration(calibration, score, f"ECE {score.calibration_error:.3f}", style)
    position.set(
        title="loss by position in the context (band: one standard error)",
        xlabel="tokens read before, in the window",
        ylabel="nats per token",
    )
    calibration.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
    calibration.set(
        title="calibration (dashed: perfect)",
        xlabel="probability of the likeliest token",
        ylabel="how often it is right",
        aspect="equal",
    )
    for axes, corner in ((position, "best"), (calibration, "lower right")):
        axes.title.set_fontsize("medium")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc=corner)
    wide = len(scores) == 1
    grid = bottom.subplots(rows, 1 if wide else columns, squeeze=False).ravel()
    for axes in grid[len(scores) :]:
        axes.set_axis_off()
    for number, (name, score) in enumerate(scores.items()):
        _draw_worst(grid[number], name, score, _style(number)["color"])
    return figure


def draw_metrics(path: Path, results: dict[str, Metrics], task: str, chance: float) -> None:
    """Each metric with its standard error, one point per model."""
    draw(path, lambda: _paint_metrics(results, task, chance))


def _paint_metrics(results: dict[str, Metrics], task: str, chance: float) -> Any:
    names = list(next(iter(results.values())))
    figure = new_figure(4.2 * len(names) + 1.5, 1.6 + 0.45 * len(results))
    figure.suptitle(f"{task} (bars: one standard error)")
    for column, axes in zip(
        names, figure.subplots(1, len(names), sharey=True, squeeze=False)[0], strict=True
    ):
        for number, metrics in enumerate(results.values()):
            metric = metrics[column]
            axes.errorbar(metric.value, number, xerr=metric.stderr, capsize=4, **_style(number))
        if chance and column.startswith("accuracy"):
            axes.axvline(chance, color="grey", linestyle="--", linewidth=1, label="chance")
            axes.legend(fontsize="small")
        axes.set_yticks(range(len(results)), map(_short, results))
        axes.set(title=column, ylim=(len(results) - 0.5, -0.5))
        axes.grid(alpha=0.3)
    return figure


def _style(number: int) -> dict[str, str]:
    """Colour and marker of model ``number``."""
    return {
        "color": _COLORS[number % len(_COLORS)],
        "marker": _MARKERS[number % len(_MARKERS)],
    }


def _draw_position(axes: Any, score: TextScore, label: str, style: dict[str, str]) -> None:
    """Means over bins of positions, with a band of one standard error."""
    count, total, squares = _binned(score)
    kept = count >= _LEAST_TOKENS
    if not kept.any():
        # the text is too short for averages: show every bin that has tokens
        kept = count > 0
    mean = total[kept] / count[kept]
    stderr = np.sqrt(np.maximum(squares[kept] / count[kept] - mean**2, 0) / count[kept])
    x = _bin_centres(score)[kept]
    axes.plot(x, mean, label=label, linewidth=1.2, markersize=4, **style)
    band = {"color": style["color"], "alpha": 0.2, "linewidth": 0}
    axes.fill_between(x, mean - stderr, mean + stderr, **band)


def _bins(score: TextScore) -> Any:
    width = -(-score.position.shape[1] // _POINTS)
    return np.arange(0, score.position.shape[1], width)


def _binned(score: TextScore) -> Any:
    return np.add.reduceat(score.position, _bins(score), axis=1)


def _bin_centres(score: TextScore) -> Any:
    edges = np.append(_bins(score), score.position.shape[1])
    # the first target has one token before it
    return (edges[:-1] + edges[1:] - 1) / 2 + 1


def _draw_calibration(axes: Any, score: TextScore, label: str, style: dict[str, str]) -> None:
    """Markers whose area shows how many tokens they represent."""
    kept = score.calibration[:, score.calibration[0] > 0]
    count, confidence, correct = kept
    axes.plot(confidence / count, correct / count, color=style["color"], linewidth=1.2)
    axes.scatter(
        confidence / count, correct / count, 10 + 150 * count / count.sum(), label=label, **style
    )


def _draw_worst(axes: Any, name: str, score: TextScore, color: str) -> None:
    losses = [worst.nll for worst in score.worst]
    places = range(len(losses))
    axes.barh(places, losses, color=color, alpha=0.35)
    for place, worst in zip(places, score.worst, strict=True):
        text = f" …{printable(worst.before)[-_SHOWN:]}▸{printable(worst.token)}"
        axes.text(0, place, text, va="center", fontsize=8, family="monospace")
    axes.set_yticks([])
    axes.set(ylim=(len(losses) - 0.5, -0.5), xlabel="nats")
    axes.set_title(f"{_short(name)}: the worst predicted tokens (▸)", fontsize="medium")


def _short(name: str) -> str:
    """The end of a long name: the part in which folders differ."""
    name = printable(name)
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"
