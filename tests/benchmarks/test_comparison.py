"""The clock, the roofline, and the comparison of two runs, which must catch a slow kernel."""

import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.bench_ops import races
from benchmarks.harness import TAPE, Lane, Race, Scale, Settings, Stopwatch
from benchmarks.machine import cpu_name
from benchmarks.op_race import OpRace
from benchmarks.results import Entry, Run, compare
from benchmarks.timing import Ceilings, Clock, Timing
from fastgpt2 import kernels
from fastgpt2.errors import UserError

SETTINGS = Settings(
    Scale.DRY, torch.device("cpu"), rounds=7, seconds=0.0, budget=60.0, memory=False
)
MACHINE = {
    "device": "chip",
    "cpu_model": "chip",
    "cores": 2,
    "date": "2026-01-02 03:04:05",
    "commit": "abc",
    "scale": "cpu",
    "torch": "2",
}
CEILINGS = {"bytes_per_s": 1e10, "flop_per_s": {"bf16": 1e12, "fp32": 1e12}}


def a_run(entries: list[Entry]) -> Run:
    return Run(MACHINE, CEILINGS, tuple(entries))


def entry(contender: str, median: float, spread: float = 0.02) -> Entry:
    low, high = median * (1 - spread / 2), median * (1 + spread / 2)
    ours = contender == "fastgpt2"
    return Entry("race", contender, ours, median, low, high, 5, {"tokens_per_s": 1 / median})


class FakeBenchmark:
    """What a race hands its samples to."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.group = ""
        self.data: list[float] = []

    def pedantic(self, play: Callable[[], None], rounds: int) -> None:
        for _ in range(rounds):
            start = TAPE.now()
            play()
            self.data.append(TAPE.now() - start)


def measured(names: tuple[str, ...]) -> Run:
    """Our LayerNorm and PyTorch's, as the suite measures them."""
    (race,) = (r for r in races(SETTINGS) if isinstance(r, OpRace) and r.case.op == "layer_norm")
    lanes = [Lane(race, name) for name in names]
    stopwatch = Stopwatch(SETTINGS, lanes, lambda line: None)
    entries = []
    for lane in lanes:
        benchmark: Any = FakeBenchmark()
        stopwatch.record(lane, benchmark)
        info = benchmark.extra_info
        timing = Timing(tuple(benchmark.data))
        times = (timing.median, info["p20"], info["p80"], len(timing.samples))
        entries.append(Entry(benchmark.group, lane.name, info["ours"], *times, info))
    return a_run(entries)


def test_a_planted_sleep_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("torch both", "eager both")
    before = measured(names)
    honest = kernels.layer_norm

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return honest(*arguments, **options)

    monkeypatch.setattr(kernels, "layer_norm", slow)
    (change,) = compare(measured(names), before)
    assert change.is_slower and change.entry.contender == "torch both"
    assert "SLOWER layer_norm" in change.line()


def test_a_wrong_kernel_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = kernels.layer_norm

    def wrong(x: torch.Tensor, *arguments: Any, impl: str, **options: Any) -> torch.Tensor:
        y = honest(x, *arguments, impl=impl, **options)
        return y if impl == "reference" else y * 1.01

    monkeypatch.setattr(kernels, "layer_norm", wrong)
    with pytest.raises(AssertionError, match="over the budget"):
        measured(("torch forward",))


def test_what_counts_as_slower() -> None:
    before = a_run([entry("fastgpt2", 1.0), entry("nanogpt", 2.0)])
    # 20 % more is more than spreads of 2 %
    (slower,) = compare(a_run([entry("fastgpt2", 1.2), entry("nanogpt", 2.0)]), before)
    assert slower.is_slower
    # but not where the samples of this run are that wide themselves
    (noisy,) = compare(a_run([entry("fastgpt2", 1.2, 0.3), entry("nanogpt", 2.0)]), before)
    assert not noisy.is_slower
    # nor where the rivals, whose code is the same, took longer, too
    (busy,) = compare(a_run([entry("fastgpt2", 1.2), entry("nanogpt", 2.4)]), before)
    assert not busy.is_slower and busy.drift == pytest.approx(1.2)
    # and a quick machine does not hide it
    (hidden,) = compare(a_run([entry("fastgpt2", 1.0), entry("nanogpt", 1.6)]), before)
    assert hidden.is_slower
    assert not compare(before, before)[0].is_slower


def git(folder: Path, *arguments: str) -> None:
    name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(folder), *name, *arguments], check=True, capture_output=True)


def test_the_report_ends_with_1_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against what was committed, however often the slow run is reported."""
    git(tmp_path, "init", "-q")
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n", encoding="utf-8")
    now = a_run([entry("fastgpt2", 1.0), entry("nanogpt", 2.0)])
    monkeypatch.setattr(Run, "of", lambda paths: now)
    arguments = [
        "x.json",
        "--results",
        str(tmp_path / "r"),
        "--readme",
        str(tmp_path / "README.md"),
    ]
    assert report.main(arguments) == 0
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    later = MACHINE | {"date": "2026-01-03 00:00:00"}
    now = replace(a_run([entry("fastgpt2", 1.3), entry("nanogpt", 2.0)]), machine=later)
    for _ in range(2):
        assert report.main(arguments) == 1
        assert "SLOWER race: fastgpt2 takes 1.30x as long" in capsys.readouterr().out
    page = (tmp_path / "r" / "2026-01-03_chip-2-cores.md").read_text(encoding="utf-8")
    assert "SLOWER race" in page
    assert "2026-01-03_chip-2-cores.md" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "not a result"),
        (b"nothing", "no JSON"),
        (b"\xb4\x00\xff", "no JSON"),
        (None, "No such file"),
    ],
)
def test_what_is_no_result(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Run.of([path])


@pytest.mark.parametrize("text", ["{}", "[]", '{"entries": [{"no": 1}]}'])
def test_a_file_among_the_results_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match=r"some\.json: not a result"):
        Run.parse(text, "some.json")


def test_a_readme_without_markers() -> None:
    with pytest.raises(UserError, match="markers"):
        report.with_table("nothing", "table")


def test_processors_of_one_name_are_told_apart(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    core = "processor: {}\nmodel name\t: AMD EPYC\ncpu family\t: 26\nmodel\t\t: 2\nflags: fpu\n\n"
    info.write_text(core.format(0) + core.format(1), encoding="utf-8")
    assert cpu_name(info) == "AMD EPYC (family 26, model 2)"
    # another system, or an architecture whose file has other words
    info.write_text("processor: 0\nBogoMIPS: 243.75\n", encoding="utf-8")
    assert cpu_name(info) == cpu_name(tmp_path / "none") != ""


def test_timing_and_roofline() -> None:
    timing = Timing((5.0, 1.0, 2.0, 3.0, 4.0, 100.0))
    assert (timing.median, timing.p20, timing.p80) == (3.5, 2.0, 5.0)
    ceilings = Ceilings(bandwidth=4e12, flops={"bf16": 8e14})
    assert ceilings.roofline(8e8, 8e6, "bf16") == pytest.approx(2e-6)
    assert ceilings.roofline(8e9, 8e6, "bf16") == pytest.approx(1e-5)


def test_the_clock_alternates() -> None:
    order: list[str] = []
    work = {name: (lambda name=name: order.append(name)) for name in "ab"}
    Clock(torch.device("cpu")).compare(work, seconds=0.0)
    assert order == ["a", "b"] * (len(order) // 2)


class Trouble(Race):
    """Nobody gets ready."""

    group, contenders = "trouble", ("fastgpt2", "rival")

    def __init__(self, error: Exception) -> None:
        self.error = error

    def prepare(self, name: str, settings: Settings) -> Callable[[], object]:
        raise self.error

    def facts(self, name: str, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("name", "error", "budget", "outcome", "message"),
    [
        ("fastgpt2", AssertionError("wrong"), 60.0, AssertionError, "wrong"),
        ("rival", AssertionError("wrong"), 60.0, AssertionError, "wrong"),
        ("fastgpt2", RuntimeError("no"), 60.0, RuntimeError, "no"),
        ("rival", RuntimeError("no"), 60.0, pytest.skip.Exception, "rival cannot: RuntimeError"),
        ("fastgpt2", torch.OutOfMemoryError(), 60.0, pytest.skip.Exception, "too little memory"),
        ("fastgpt2", AssertionError("never asked"), 0.0, pytest.skip.Exception, "used up"),
    ],
)
def test_who_cannot_take_part(
    name: str, error: Exception, budget: float, outcome: type[BaseException], message: str
) -> None:
    lane = Lane(Trouble(error), name)
    stopwatch = Stopwatch(replace(SETTINGS, budget=budget), [lane], lambda line: None)
    benchmark: Any = FakeBenchmark()
    with pytest.raises(outcome, match=message):
        stopwatch.record(lane, benchmark)
