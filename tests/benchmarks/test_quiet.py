"""What else ran during a race, and what a difference within the noise is called."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, report
from benchmarks.harness import RUNS, Lane, Race, Scale, Settings, Stopwatch
from benchmarks.quiet import Disturbance, Watch
from benchmarks.results import Entry, Ratio, Run
from benchmarks.tables import NO_DIFFERENCE, race_table, readme_lines
from benchmarks.timing import Ceilings, Work
from tests.benchmarks.test_comparison import CEILINGS, MACHINE, FakeBenchmark

SETTINGS = Settings(Scale.CPU, torch.device("cpu"), 1, 0.0, 60.0, memory=False)


def stat(path: Path, *, busy: int, idle: int) -> None:
    path.write_text(f"cpu  {busy} 0 0 {idle} 7 0 0 0 0 0\ncpu0 1 0 0\n", encoding="utf-8")


def test_other_programs_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, own, path = [0.0], [5.0], tmp_path / "stat"
    monkeypatch.setattr("benchmarks.quiet.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("benchmarks.quiet._own_seconds", lambda: own[0])
    monkeypatch.setattr("benchmarks.quiet.os.sysconf", lambda name: 100)
    stat(path, busy=1000, idle=500)
    watch = Watch(path)
    # ten seconds on two cores: all spend 15, of which 12 are ours
    now[0], own[0] = 10.0, 17.0
    stat(path, busy=2500, idle=1000)
    seen = watch.seen()
    assert seen.others == pytest.approx(0.3) and seen.is_disturbed
    # our own work is not a disturbance, however long it waits
    stat(path, busy=2200, idle=9000)
    assert watch.seen().others == 0.0 and not watch.seen().is_disturbed


def test_nothing_is_claimed_where_the_system_does_not_say(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "none")
    assert watch.seen().others is None and not watch.seen().is_disturbed


class Sleeper(Race):
    """A race that measures nothing."""

    group, contenders = "race", ("fastgpt2",)

    def prepare(self, name: str, settings: Settings) -> Work:
        return lambda: None

    def facts(self, name: str, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("shares", "runs", "kept"),
    [([0.5, 0.02], 2, 0.02), ([0.0], 1, 0.0), ([0.9, 0.4, 0.6], RUNS, 0.4), ([None], 1, None)],
)
def test_a_disturbed_race_is_run_again_and_the_quietest_counts(
    monkeypatch: pytest.MonkeyPatch,
    shares: list[float | None],
    runs: int,
    kept: float | None,
) -> None:
    rest = iter(shares)
    taken = []

    class Fake:
        def seen(self) -> Disturbance:
            taken.append(1)
            return Disturbance(next(rest), 3)

    monkeypatch.setattr(harness, "Watch", Fake)
    monkeypatch.setattr(harness, "measure_ceilings", lambda *_, **__: Ceilings(1e10, {}))
    lane = Lane(Sleeper(), "fastgpt2")
    benchmark: Any = FakeBenchmark()
    Stopwatch(SETTINGS, [lane], lambda line: None).record(lane, benchmark)
    assert (len(taken), benchmark.extra_info["others"]) == (runs, kept)


def step(contender: str, median: float, spread: float = 0.02, **facts: Any) -> Entry:
    low, high = median * (1 - spread / 2), median * (1 + spread / 2)
    rates = {"tokens_per_s": 100 / median, "mfu": None}
    ours = contender.startswith("fastgpt2")
    return Entry("train step", contender, ours, median, low, high, 10, rates | facts)


def a_run(*entries: Entry, scale: str = "cpu") -> Run:
    return Run(MACHINE | {"scale": scale}, CEILINGS, entries)


def test_a_difference_inside_the_spread_is_none() -> None:
    ours = step("fastgpt2", 1.0)
    assert Ratio.of(step("rival", 1.1), ours).is_difference
    assert Ratio.of(step("rival", 0.9), ours).is_difference
    assert not Ratio.of(step("rival", 1.1, 0.3), ours).is_difference
    table = "\n".join(race_table([ours, step("rival", 1.02), step("other", 2.0)]))
    assert f"| rival | 1.02 s | 1.01 s - 1.03 s | {NO_DIFFERENCE} |" in table
    assert "| other | 2 s | 1.98 s - 2.02 s | 2.00 |" in table


def headline(run: Run) -> str:
    return "\n".join(readme_lines(run, "report.md"))


def test_like_is_compared_with_like() -> None:
    entries = [
        step("fastgpt2", 1.0),
        step("fastgpt2 compiled", 0.5),
        step("nanogpt", 2.0),
        step("nanogpt compiled", 1.5),
        step("engine", 3.0),
    ]
    text = headline(a_run(*entries))
    assert (
        "| train step | 100 / 200 | nanogpt | 2.00 (1.96 to 2.04) | 3.00 (2.94 to 3.06) |" in text
    )
    # what has one form meets both of ours
    assert "| engine | 3.00 (2.94 to 3.06) | 6.00 (5.88 to 6.12) |" in text


def test_a_disturbed_race_is_marked() -> None:
    entries = [step("fastgpt2", 1.0, others=0.6), step("nanogpt", 2.0, others=0.6)]
    assert "| train step (disturbed) |" in headline(a_run(*entries))


@pytest.mark.parametrize(
    ("scale", "words"), [("cpu", "No GPU run yet"), ("cuda", "Measured on chip")]
)
def test_the_first_sentence_says_what_was_measured(scale: str, words: str) -> None:
    assert words in report.measured_line([a_run(step("fastgpt2", 1.0), scale=scale)])


def test_growth_and_large_batches_stay_in_the_report() -> None:
    def decode(B: int) -> list[Entry]:
        return [
            replace(step(name, 1.0, phase="decode", B=B), group=f"decode B{B}")
            for name in ("fastgpt2", "rival")
        ]

    entries = [e for B in (1, 8, 64) for e in decode(B)]
    for e in entries:
        del e.facts["mfu"]
    grown = [step(name, 1.0, axis="T") for name in ("fastgpt2", "rival")]
    text = headline(a_run(*entries, *(replace(e, group="growth") for e in grown)))
    assert "decode B1" in text and "decode B8" in text
    assert "B64" not in text and "growth" not in text
