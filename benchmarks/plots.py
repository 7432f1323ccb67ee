"""The report's pictures: bars for each kind of race, the roofline, growth of the cost."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Entry, Run, baseline
from fastgpt2 import picture

# Okabe and Ito's colours, which everyone can tell apart: ours, then rivals
OURS, RIVALS = "#0072B2", ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
Groups = dict[str, list[Entry]]


def _select(run: Run, wanted: Callable[[Entry], bool]) -> Groups:
    return {name: group for name, group in run.groups().items() if wanted(group[0])}


def _bars(axes: Any, title: str, group: Sequence[Entry]) -> None:
    """Tokens per second of each contender, with the percentiles' range."""
    rates = [e.facts["tokens_per_s"] for e in group]
    # the slow percentile of the time is the low one of the rate
    low = [rate - rate * e.median / e.p80 for rate, e in zip(rates, group, strict=True)]
    high = [rate * e.median / e.p20 - rate for rate, e in zip(rates, group, strict=True)]
    names = [e.contender for e in group]
    colours = [OURS if e.ours else RIVALS[-1] for e in group]
    bars = axes.barh(names, rates, xerr=[low, high], color=colours, ecolor="#444444", capsize=2)
    axes.bar_label(bars, [f" {rate:,.0f}" for rate in rates], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(r + h for r, h in zip(rates, high, strict=True)) * 1.25)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("tokens/s", fontsize=8)
    axes.tick_params(labelsize=8)


def _bar_page(groups: Groups) -> Any:
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    longest = max(len(group) for group in groups.values())
    figure = picture.new_figure(5.2 * columns, (0.9 + 0.34 * longest) * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (name, group) in zip(grid.flat, groups.items(), strict=False):
        _bars(axes, name, group)
    for axes in list(grid.flat)[len(groups) :]:
        axes.set_visible(False)
    return figure


def _ops(groups: Groups) -> Any:
    """Each rival's time over ours, forward and backward together."""
    chosen = []
    for group in groups.values():
        mode = max((e.mode for e in group), key=("forward", "backward", "both").index)
        chosen.append([e for e in group if e.mode == mode])
    providers = list(
        dict.fromkeys(
            e.facts["provider"]
            for group in chosen
            for e in group
            if not e.ours and baseline(e, group) is not None
        )
    )
    figure = picture.new_figure(9, 1.2 + 0.55 * len(chosen))
    axes = figure.subplots()
    height = 0.8 / max(len(providers), 1)
    for k, provider in enumerate(providers):
        for i, group in enumerate(chosen):
            entry = next((e for e in group if e.facts["provider"] == provider), None)
            ours = None if entry is None else baseline(entry, group)
            if entry is None or ours is None:
                continue
            ratio = entry.median / ours.median
            label = provider if i == 0 else None
            y = i + (k - (len(providers) - 1) / 2) * height
            axes.barh(y, ratio, height, color=RIVALS[k % len(RIVALS)], label=label)
            axes.text(ratio, y, f" {ratio:.2f}", va="center", fontsize=7)
    axes.axvline(1.0, color=OURS, linewidth=1.5, label="ours")
    names = [
        f"{group[0].facts['op']}\n{group[0].facts['shape']}, {group[0].mode}" for group in chosen
    ]
    axes.set_yticks(range(len(chosen)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(
        "how many times faster ours is than the rival in the same form",
        fontsize=8,
    )
    axes.margins(x=0.08)
    axes.set_title("ops: how many times faster ours is", fontsize=10)
    axes.legend(fontsize=8)
    return figure


def _roofline(run: Run, groups: Groups) -> Any:
    """Ours and eager PyTorch under the ceilings measured in the same run."""
    figure = picture.new_figure(8.5, 5.6)
    axes = figure.subplots()
    entries = [
        e
        for group in groups.values()
        for e in group
        if e is baseline(e, group) or e.facts["provider"] == "eager"
    ]
    dtype = entries[0].facts["dtype"]
    peak, bandwidth = run.ceilings["flop_per_s"][dtype], run.ceilings["bytes_per_s"]
    at = [e.facts["flops"] / e.facts["bytes"] for e in entries]
    left, right = min(at) / 3, max(max(at), peak / bandwidth) * 3
    corner = peak / bandwidth
    axes.plot(
        [left, corner, right],
        [left * bandwidth / 1e12, peak / 1e12, peak / 1e12],
        color="black",
        label=f"copy {bandwidth / 1e9:.3g} GB/s, {dtype} matmul {peak / 1e12:.3g} TFLOP/s",
    )
    marks = {"forward": "o", "backward": "s", "both": "^"}
    shown: set[str] = set()
    for e in entries:
        who = "ours" if e.ours else "eager"
        label = f"{who}, {e.mode}"
        axes.plot(
            e.facts["flops"] / e.facts["bytes"],
            e.facts["TFLOP_per_s"],
            marks[e.mode],
            color=OURS if e.ours else RIVALS[0],
            fillstyle="full" if e.ours else "none",
            label=None if label in shown else label,
        )
        shown.add(label)
        if e.ours and e.mode == "forward":
            axes.annotate(
                e.facts["op"],
                (e.facts["flops"] / e.facts["bytes"], e.facts["TFLOP_per_s"]),
                xytext=(6, -9),
                textcoords="offset points",
                fontsize=8,
            )
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s")
    picture.plain_numbers(axes)
    axes.set_title("roofline, measured in the same run", fontsize=10)
    axes.grid(True, which="both", alpha=0.2)
    figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    return figure


def _growth(groups: Groups) -> Any:
    """Tokens per second along each axis."""
    names = list(dict.fromkeys(group[0].facts["axis"] for group in groups.values()))
    figure = picture.new_figure(5 * len(names), 3.8)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names, strict=True):
        points = [e for group in groups.values() for e in group if e.facts["axis"] == name]
        for k, contender in enumerate(dict.fromkeys(e.contender for e in points)):
            mine = [e for e in points if e.contender == contender]
            axes.plot(
                [str(e.facts["value"]) for e in mine],
                [e.facts["tokens_per_s"] for e in mine],
                "o-",
                color=OURS if mine[0].ours else RIVALS[k % len(RIVALS)],
                label=contender,
            )
        axes.set(yscale="log", xlabel=name, ylabel="tokens/s")
        for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            ticks(lambda rate, _: f"{rate:,.0f}")
        axes.tick_params(which="both", labelsize=7)
        axes.set_title(f"training step, along {name}", fontsize=10)
        axes.grid(True, which="both", alpha=0.2)
        axes.legend(fontsize=8)
    return figure


def draw(run: Run, folder: Path, stem: str) -> list[Path]:
    """Save the pictures that this run has numbers for; returns their paths."""
    growth = _select(run, lambda e: "axis" in e.facts)
    train = _select(run, lambda e: "mfu" in e.facts and "axis" not in e.facts)
    generate = _select(run, lambda e: "phase" in e.facts)
    ops = _select(run, lambda e: "provider" in e.facts)
    with_flops = {n: g for n, g in ops.items() if g[0].facts["flops"] > 0}
    pages: dict[str, tuple[Groups, Callable[[], Any]]] = {
        "train": (train, lambda: _bar_page(train)),
        "generate": (generate, lambda: _bar_page(generate)),
        "ops": (ops, lambda: _ops(ops)),
        "roofline": (with_flops, lambda: _roofline(run, with_flops)),
        "growth": (growth, lambda: _growth(growth)),
    }
    paths = []
    for name, (groups, page) in pages.items():
        if groups:
            path = folder / f"{stem}_{name}.png"
            if picture.draw(path, page, dpi=110):
                paths.append(path)
    return paths
