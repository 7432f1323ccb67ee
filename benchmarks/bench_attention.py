"""Causal attention over packed q, k, v: ours, SDPA and its backends."""

from collections.abc import Callable

from benchmarks.harness import Lane, Race, Settings
from benchmarks.op_race import op_races


def races(settings: Settings) -> list[Race]:
    """A race for each op and size."""
    return op_races(settings, "attention")


def test_attention(lane: Lane, record: Callable[[Lane], None]) -> None:
    """One provider in one mode."""
    record(lane)
