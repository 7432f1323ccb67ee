"""How a pytest-benchmark test gets its samples: all contenders of a race alternate in one run.

pytest-benchmark times one callable per test, one test after another, so that heat or other programs
in between can look like a difference. Here the first test of a race prepares and checks the
selected contenders and times them alternately with ``timing.Clock``. Each test passes its own
samples to pytest-benchmark, whose timer, ``Tape``, replays them. The statistics in the JSON are
those of the measured samples.
"""

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.quiet import Disturbance, Watch
from benchmarks.timing import (
    DRY_FLUSH_BYTES,
    FLUSH_BYTES,
    Ceilings,
    Clock,
    Timing,
    Work,
    measure_ceilings,
)
from fastgpt2.devices import dtype_notice

# a race disturbed by other programs is run at most so many times
RUNS = 3


class Scale(StrEnum):
    """The sizes: GPT-2's real ones on a GPU, sizes for minutes on two cores, tiny ones."""

    CUDA = "cuda"
    CPU = "cpu"
    DRY = "dry"


def compute_dtype(scale: Scale) -> torch.dtype:
    """The dtype that is timed: bf16, or fp32 on a CPU without bf16 instructions.

    A dry run uses fp32, because Triton's interpreter multiplies bf16 matrices wrongly.
    """
    slow = scale is Scale.CPU and dtype_notice(torch.device("cpu"), torch.bfloat16) is not None
    return torch.float32 if slow or scale is Scale.DRY else torch.bfloat16


@dataclass(frozen=True)
class Settings:
    """The options of a run of the suite.

    Attributes:
        scale: the sizes.
        device: where it runs.
        rounds: samples of each contender, at least.
        seconds: least duration of a race.
        budget: seconds after which no further contender is prepared.
        memory: whether the training step's peak memory is measured (a process for each contender).
    """

    scale: Scale
    device: torch.device
    rounds: int
    seconds: float
    budget: float
    memory: bool


class Race(ABC):
    """Several contenders with the same inputs and the same results, timed against each other.

    Attributes:
        group: its name in the tables.
        contenders: names, ours first.
        head_start: whether a GPU's times exclude launching; true for single kernels.
    """

    group: str
    contenders: tuple[str, ...]
    head_start = False

    @abstractmethod
    def prepare(self, name: str, settings: Settings) -> Work:
        """What to time for one contender, after it has run once and its result was checked.

        Raises:
            pytest.skip.Exception: it cannot run here; says why.
            AssertionError: its result is wrong; says by how much.
        """

    @abstractmethod
    def facts(self, name: str, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
        """What the JSON records beside the median time: rates, shares, shapes."""

    def is_ours(self, name: str) -> bool:
        """Whether a contender is this package, which the report checks for slowdowns."""
        return name.startswith("fastgpt2")

    def close(self) -> None:  # noqa: B027
        """Free inputs and models after the race."""


@dataclass(frozen=True)
class Lane:
    """One contender in one race: one test."""

    race: Race
    name: str

    @property
    def id(self) -> str:
        """The name that ``-k`` matches."""
        return f"{self.race.group}-{self.name}"


def lanes(races: Sequence[Race]) -> list[Lane]:
    """One test for every contender of every race, race by race."""
    return [Lane(race, name) for race in races for name in race.contenders]


class Tape:
    """pytest-benchmark's timer: a clock that advances only by the samples played."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        """Seconds played so far."""
        return self.seconds

    def player(self, samples: Sequence[float]) -> Callable[[], None]:
        """A function to call once per sample; each call advances the clock by that sample."""
        rest = iter(samples)
        # start from 0, so that the sum does not round the samples
        self.seconds = 0.0

        def play() -> None:
            self.seconds += next(rest)

        return play


TAPE = Tape()


def _judged(trouble: BaseException, name: str, ours: bool) -> BaseException:
    """How a test ends: a wrong result fails it, a rival that cannot run is skipped."""
    reason = f"{name} cannot: {type(trouble).__name__}: {str(trouble).partition(chr(10))[0]}"
    if isinstance(trouble, torch.OutOfMemoryError):
        return pytest.skip.Exception(f"{name}: too little memory")
    if isinstance(trouble, AssertionError | pytest.skip.Exception) or ours:
        return trouble
    return pytest.skip.Exception(reason)


class Stopwatch:
    """Runs each race at its first test, and keeps the times for the other tests."""

    def __init__(
        self, settings: Settings, selected: Sequence[Lane], notify: Callable[[str], None]
    ) -> None:
        self.settings, self.selected, self.notify = settings, selected, notify
        real = settings.scale is not Scale.DRY
        self._flush_bytes = FLUSH_BYTES if real else DRY_FLUSH_BYTES
        self.ceilings = measure_ceilings(
            self._clock(), settings.device, seconds=1.0 if real else 0.0
        )
        self.end = time.perf_counter() + settings.budget
        self._race: Race | None = None
        self._timings: dict[str, Timing] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._troubles: dict[str, BaseException] = {}

    def _clock(self, *, head_start: bool = True) -> Clock:
        chosen = self.settings
        return Clock(
            chosen.device,
            head_start=head_start,
            rounds=chosen.rounds,
            flush_bytes=self._flush_bytes,
        )

    def record(self, lane: Lane, benchmark: BenchmarkFixture) -> None:
        """Give this contender's samples and facts to pytest-benchmark.

        Raises:
            pytest.skip.Exception: it cannot run; says why.
            AssertionError: its result is wrong, so its speed does not count.
        """
        if self._race is not lane.race:
            self._run(lane.race)
        if lane.name in self._troubles:
            raise self._troubles[lane.name]
        timing = self._timings[lane.name]
        benchmark.group = lane.race.group
        benchmark.extra_info |= {
            "contender": lane.name,
            "ours": lane.race.is_ours(lane.name),
            "p20": timing.p20,
            "p80": timing.p80,
            **self._facts[lane.name],
        }
        play = TAPE.player(timing.samples)
        benchmark.pedantic(play, rounds=len(timing.samples))  # type: ignore[no-untyped-call]

    def _measure(self, race: Race, works: dict[str, Work]) -> tuple[dict[str, Timing], Disturbance]:
        """Time the race, again if other programs disturbed it; the quietest run counts."""
        chosen = self.settings
        clock = self._clock(head_start=race.head_start)
        runs: list[tuple[dict[str, Timing], Disturbance]] = []
        for _ in range(1 if chosen.scale is Scale.DRY else RUNS):
            watch = Watch()
            timings = clock.compare(works, seconds=chosen.seconds)
            runs.append((timings, watch.seen()))
            if not runs[-1][1].is_disturbed or time.perf_counter() > self.end:
                break
            self.notify(f"{race.group}: other programs had {runs[-1][1].others:.2f} cores")
        return min(runs, key=lambda run: run[1].others or 0.0)

    def _run(self, race: Race) -> None:
        self._race, chosen = race, self.settings
        self._troubles = {}
        works: dict[str, Work] = {}
        for name in (lane.name for lane in self.selected if lane.race is race):
            try:
                if time.perf_counter() > self.end:
                    pytest.skip(f"the {chosen.budget:.0f} seconds were used up")
                self.notify(f"{race.group}: {name} gets ready")
                works[name] = race.prepare(name, chosen)
            except (Exception, pytest.skip.Exception) as trouble:
                # the others still have their times
                self._troubles[name] = _judged(trouble, name, race.is_ours(name))
        if works:
            self.notify(f"{race.group}: {len(works)} contenders, by turns")
        disturbance = Disturbance(None, None)
        try:
            self._timings = {}
            if works:
                self._timings, disturbance = self._measure(race, works)
        except Exception as trouble:
            # together they may need more memory than each alone
            self._troubles |= {name: _judged(trouble, name, True) for name in works}
            self._timings = {}
        self._facts = {
            name: race.facts(name, timing.median, self.ceilings) | asdict(disturbance)
            for name, timing in self._timings.items()
        }
        works.clear()
        race.close()
        gc.collect()
        # a function is recompiled for each race; beyond a limit it would run uncompiled
        torch.compiler.reset()
        if chosen.device.type == "cuda":
            torch.cuda.empty_cache()
