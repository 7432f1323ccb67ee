"""A run as Markdown: a table for each race, and the short one of the README."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.results import Entry, Run, baseline

WORDS = ("contender", "what", "who", "op", "pass")
# columns beside the times, where a race has them: key, heading, how it is shown
_FACTS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("tokens_per_s", "tokens/s", lambda x: f"{x:,.0f}"),
    ("mfu", "MFU", lambda x: f"{x:.1%}"),
    ("matmul_share", "of matmul", lambda x: f"{x:.0%}"),
    ("GB_per_s", "GB/s", lambda x: f"{x:.1f}"),
    ("MB_per_s", "MB/s", lambda x: f"{x:.1f}"),
    ("TFLOP_per_s", "TFLOP/s", lambda x: f"{x:.3g}"),
    ("roofline", "of roofline", lambda x: f"{x:.0%}"),
    ("peak_bytes", "peak GB", lambda x: f"{x / 1e9:.2f}"),
)


# with two threads and one core free, every parallel loop waits for the scheduler
BUSY = (
    "The machine was busy with other programs: times of milliseconds are those of its scheduler, "
    "and nothing here is a ground for comparisons. To be measured again on a quiet machine."
)


def is_busy(run: Run) -> bool:
    """Whether more was running at the end than there are cores for."""
    load, cores = run.machine.get("load"), run.machine["cores"]
    return load is not None and bool(load > 1.5 * cores)


def duration(seconds: float) -> str:
    """In the unit that people would use."""
    units = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
    unit, size = next((u for u in units if seconds >= u[1]), units[-1])
    x = seconds / size
    return f"{x:.0f} {unit}" if x >= 100 else f"{x:.3g} {unit}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table; columns of words stand left, those of numbers right."""
    yield f"| {' | '.join(header)} |"
    yield f"|{''.join('---|' if name in WORDS else '---:|' for name in header)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def versus(entry: Entry, group: Sequence[Entry]) -> str:
    """How many times as long as ours it takes."""
    ours = baseline(entry, group)
    return "-" if ours is None else f"{entry.median / ours.median:.2f}"


def race_table(group: Sequence[Entry]) -> Iterator[str]:
    """All contenders of one race."""
    shown = [fact for fact in _FACTS if any(e.facts.get(fact[0]) is not None for e in group)]
    header = [
        "contender",
        "median",
        "20-80 %",
        "time / ours",
        *(heading for _, heading, _ in shown),
    ]
    rows = []
    for e in group:
        values = [(e.facts.get(key), show) for key, _, show in shown]
        rows.append(
            [
                f"**{e.contender}**" if e.ours else e.contender,
                duration(e.median),
                f"{duration(e.p20)} - {duration(e.p80)}",
                versus(e, group),
                *("-" if value is None else show(value) for value, show in values),
            ]
        )
    return markdown(header, rows)


def machine_lines(run: Run) -> Iterator[str]:
    """What the numbers were measured on."""
    m, ceilings = run.machine, run.ceilings
    versions = ("python", "torch", "triton", "transformers", "ctranslate2", "cuda", "cudnn")
    yield f"- device: {m['device']}; processor: {m['cpu_model']}, {m['cores']} cores"
    if m.get("nvidia_smi"):
        yield f"- name, driver, clocks, power: {m['nvidia_smi']}"
    yield f"- {', '.join(f'{name} {m[name]}' for name in versions if m.get(name))}"
    yield f"- commit {m['commit']}, {m['date']}, scale `{m['scale']}`"
    if m.get("load") is not None:
        yield f"- load average at the end: {m['load']:.1f}"
    if is_busy(run):
        yield f"- **{BUSY}**"
    flops = ", ".join(
        f"{x / 1e12:.3g} TFLOP/s {name}" for name, x in ceilings["flop_per_s"].items()
    )
    yield (
        f"- measured in the same run: copy {ceilings['bytes_per_s'] / 1e9:.1f} GB/s (read plus "
        f"write), large matmul {flops}: the roofline's two lines"
    )


def summary_lines(run: Run) -> Iterator[str]:
    """One line a contender of each race, for a terminal."""
    for name, group in run.groups().items():
        yield name
        for e in group:
            facts = [
                f"{show(e.facts[key])} {heading}"
                for key, heading, show in _FACTS
                if e.facts.get(key) is not None
            ]
            yield (
                f"  {e.contender:28} {duration(e.median):>8} "
                f"[{duration(e.p20)}, {duration(e.p80)}] {versus(e, group):>6}x ours  "
                f"{', '.join(facts)}"
            )


def import_line(run: Run) -> str | None:
    """What ``import fastgpt2`` adds to ``import torch``."""
    for group in run.groups().values():
        times = {e.contender: e.median for e in group if "program" in e.facts}
        if {"fastgpt2", "torch"} <= set(times):
            extra = times["fastgpt2"] - times["torch"]
            return f"`from fastgpt2 import GPT` takes {extra:.2f} s more than `import torch`."
    return None


def readme_lines(run: Run, report: str) -> Iterator[str]:
    """The README's table of one machine: training, generation, ops."""
    m = run.machine
    yield f"**{m['device']}**, {m['cores']} cores, torch {m['torch']}, {run.date}"
    yield f"([all of it, with plots]({report})):"
    if is_busy(run):
        yield ""
        yield f"> {BUSY}"
    yield ""
    rows = []
    # the axes of growth, loaders and the like are for the report; training comes first
    races = [(n, g) for n, g in run.groups().items() if {"mfu", "phase"} & set(g[0].facts)]
    races = [(n, g) for n, g in races if "axis" not in g[0].facts]
    for name, group in sorted(races, key=lambda race: "mfu" not in race[1][0].facts):
        for e in group:
            memory = e.facts.get("peak_bytes")
            rows.append(
                [
                    name,
                    f"**{e.contender}**" if e.ours else e.contender,
                    f"{e.facts['tokens_per_s']:,.0f}",
                    versus(e, group),
                    "" if memory is None else f"{memory / 1e9:.2f}",
                ]
            )
    yield from markdown(("what", "who", "tokens/s", "time / ours", "peak GB"), rows)
    ops = [
        [e.facts["op"], e.mode, *_rival_times(e, group)]
        for group in run.groups().values()
        for e in group
        if e is baseline(e, group) and "op" in e.facts and e.mode != "backward"
    ]
    if ops:
        yield ""
        yield from markdown(("op", "pass", "ours", "eager / ours", "compiled / ours"), ops)


def _rival_times(ours: Entry, group: Sequence[Entry]) -> Iterator[str]:
    yield duration(ours.median)
    for provider in ("eager", "compile"):
        rival = next((e for e in group if e.contender == f"{provider} {ours.mode}"), None)
        yield "-" if rival is None else f"{rival.median / ours.median:.2f}"
