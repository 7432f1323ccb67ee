from itertools import pairwise

import pytest

from fastgpt2.train.schedules import SCHEDULES, WSD_DECAY, learning_rate, progress

POINTS = [i / 100 for i in range(101)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_starts_at_1_and_never_rises(name: str) -> None:
    schedule = SCHEDULES[name]
    assert schedule(0.0) == 1.0
    assert all(later <= earlier for earlier, later in pairwise(map(schedule, POINTS)))


@pytest.mark.parametrize(
    ("name", "half", "end"),
    [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1.0, 1.0), ("wsd", 1.0, 0.0)],
)
def test_values_in_the_middle_and_at_the_end(name: str, half: float, end: float) -> None:
    assert SCHEDULES[name](0.5) == pytest.approx(half)
    assert SCHEDULES[name](1.0) == pytest.approx(end)


def test_wsd_is_stable_then_falls_in_a_straight_line() -> None:
    wsd = SCHEDULES["wsd"]
    assert wsd(1 - WSD_DECAY) == pytest.approx(1.0)
    assert wsd(1 - WSD_DECAY / 2) == pytest.approx(0.5)
    assert wsd(1 - WSD_DECAY / 4) == pytest.approx(0.25)


def rate(step: int, done: float = 0.0, schedule: str = "cosine", warmup_steps: int = 4) -> float:
    return learning_rate(schedule, step, done, lr=1.0, min_lr=0.1, warmup_steps=warmup_steps)


def test_warm_up_rises_in_equal_steps_to_the_peak() -> None:
    assert [rate(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rate(0, warmup_steps=0) == 1.0


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_schedules_end_at_the_lowest_rate(name: str) -> None:
    assert rate(9, 1.0, name) == pytest.approx(0.1)
    # a run by time may go a step too far
    assert rate(9, 1.5, name) == pytest.approx(0.1)


def by(step: int, elapsed: float = 0.0, **limits: int | float | None) -> float:
    defaults: dict[str, int | float | None] = dict(total_steps=None, warmup_steps=0, minutes=None)
    return progress(step, elapsed, **(defaults | limits))  # type: ignore[arg-type]


def test_progress_counts_steps_behind_the_warm_up() -> None:
    limits = dict(total_steps=12, warmup_steps=2)
    assert [by(step, **limits) for step in (0, 2, 7, 12)] == [0.0, 0.0, 0.5, 1.0]


def test_progress_by_time_and_by_whichever_is_further() -> None:
    assert by(999, 90.0, minutes=3.0) == 0.5
    assert by(5, 90.0, minutes=3.0, total_steps=100) == 0.5
    assert by(90, 90.0, minutes=3.0, total_steps=100) == 0.9


@pytest.mark.parametrize("total_steps", [1, 2, 5])
def test_a_run_shorter_than_its_warm_up_ends(total_steps: int) -> None:
    limits = dict(total_steps=total_steps, warmup_steps=100)
    assert by(total_steps - 1, **limits) < 1.0
    assert by(total_steps, **limits) >= 1.0
