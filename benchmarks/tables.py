"""A run as Markdown: one table per race, and the README's short table."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.quiet import QUIET_SHARE
from benchmarks.results import Entry, Ratio, Run, baseline

WORDS = ("contender", "what", "who", "op", "pass")
# further columns, if a race has them: key, heading, format
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


NO_DIFFERENCE = "no difference"
# marks a race that other programs disturbed in each of its runs
DISTURBED = "disturbed"
_COMPILED = " compiled"


def was_disturbed(group: Sequence[Entry]) -> bool:
    """Whether other programs ran beside the race."""
    others = [e.facts.get("others") for e in group]
    return any(x is not None and x > QUIET_SHARE for x in others)


def duration(seconds: float) -> str:
    """Seconds as text, in s, ms or µs."""
    units = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
    unit, size = next((u for u in units if seconds >= u[1]), units[-1])
    x = seconds / size
    return f"{x:.0f} {unit}" if x >= 100 else f"{x:.3g} {unit}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table; words are aligned left, numbers right."""
    yield f"| {' | '.join(header)} |"
    yield f"|{''.join('---|' if name in WORDS else '---:|' for name in header)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def times_faster(ratio: Ratio) -> str:
    """How many times faster ours is, or ``NO_DIFFERENCE``."""
    return f"{ratio.value:.2f}" if ratio.is_difference else NO_DIFFERENCE


def versus(entry: Entry, group: Sequence[Entry]) -> str:
    """How many times faster ours is than this entry."""
    ours = baseline(entry, group)
    if ours is None:
        return "-"
    return "1" if entry is ours else times_faster(Ratio.of(entry, ours))


def race_table(group: Sequence[Entry]) -> Iterator[str]:
    """All contenders of one race."""
    shown = [fact for fact in _FACTS if any(e.facts.get(fact[0]) is not None for e in group)]
    header = [
        "contender",
        "median",
        "20-80 %",
        "ours is x faster",
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
    """The machine, versions and ceilings of a run."""
    m, ceilings = run.machine, run.ceilings
    versions = ("python", "torch", "triton", "transformers", "ctranslate2", "cuda", "cudnn")
    yield f"- device: {m['device']}; processor: {m['cpu_model']}, {m['cores']} cores"
    if m.get("nvidia_smi"):
        yield f"- name, driver, clocks, power: {m['nvidia_smi']}"
    yield f"- {', '.join(f'{name} {m[name]}' for name in versions if m.get(name))}"
    yield f"- commit {m['commit']}, {m['date']}, scale `{m['scale']}`"
    groups = run.groups()
    disturbed = [name for name, group in groups.items() if was_disturbed(group)]
    if disturbed:
        yield (
            f"- other programs had more than {QUIET_SHARE:g} cores during {len(disturbed)} of "
            f"{len(groups)} races, each time they were run: {', '.join(disturbed)}"
        )
    flops = ", ".join(
        f"{x / 1e12:.3g} TFLOP/s {name}" for name, x in ceilings["flop_per_s"].items()
    )
    yield (
        f"- measured in the same run: copy {ceilings['bytes_per_s'] / 1e9:.1f} GB/s (read plus "
        f"write), large matmul {flops}: the roofline's two lines"
    )


def summary_lines(run: Run) -> Iterator[str]:
    """One line per contender of each race, for a terminal."""
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
                f"[{duration(e.p20)}, {duration(e.p80)}] {versus(e, group):>13}  "
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
    """The README's table of one machine: the training step, and generation at batch 1 and 8."""
    m = run.machine
    yield f"**{m['device']}**, {m['cores']} cores, torch {m['torch']}, {run.date}"
    yield f"([all of it, with plots]({report})):"
    yield ""
    rows = [
        row
        for name, group in sorted(
            run.groups().items(), key=lambda race: "mfu" not in race[1][0].facts
        )
        if _is_headline(group[0])
        for row in _headline_rows(name, group)
    ]
    header = (
        "what",
        "ours, tokens/s",
        "who",
        "eager: ours is x faster",
        "compiled: ours is x faster",
    )
    yield from markdown(header, rows)


def _is_headline(entry: Entry) -> bool:
    """Whether the README shows the race: training, or generation at batch 1 or 8."""
    if "axis" in entry.facts:
        # growth is shown in the report only
        return False
    return "mfu" in entry.facts or ("phase" in entry.facts and entry.facts["B"] in (1, 8))


def _headline_rows(name: str, group: Sequence[Entry]) -> Iterator[list[str]]:
    """One row per rival: its eager form against ours, its compiled form against ours."""
    found = {e.contender: e for e in group}
    ours = [e for e in group if e.ours]
    if not ours:
        return
    forms = (ours[0], next((e for e in ours if e.contender.endswith(_COMPILED)), None))
    rates = " / ".join(f"{e.facts['tokens_per_s']:,.0f}" for e in forms if e is not None)
    shown = f"{name} ({DISTURBED})" if was_disturbed(group) else name
    for rival in dict.fromkeys(e.contender.removesuffix(_COMPILED) for e in group if not e.ours):
        eager, compiled = found.get(rival), found.get(rival + _COMPILED)
        # a separate engine has one form, which is compared with both of ours
        pairs = zip((eager, compiled or eager), forms, strict=True)
        cells = [
            "-" if theirs is None or mine is None else _with_range(Ratio.of(theirs, mine))
            for theirs, mine in pairs
        ]
        yield [shown, rates, rival, *cells]


def _with_range(ratio: Ratio) -> str:
    return f"{times_faster(ratio)} ({ratio.low:.2f} to {ratio.high:.2f})"
