"""Cross-entropy of logits, and of the head and its input without the logits."""

from collections.abc import Callable

from benchmarks.harness import Lane, Race, Settings
from benchmarks.op_race import op_races


def races(settings: Settings) -> list[Race]:
    """A race for each op and size."""
    return op_races(settings, "cross_entropy", "linear_cross_entropy")


def test_cross_entropy(lane: Lane, record: Callable[[Lane], None]) -> None:
    """One provider in one mode."""
    record(lane)
