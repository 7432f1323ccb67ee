"""Time every op at GPT-2's sizes, ours and PyTorch's: forward, backward and both."""

from collections.abc import Callable

from benchmarks.harness import Lane, Race, Settings
from benchmarks.op_race import op_races


def races(settings: Settings) -> list[Race]:
    """A race for each op and size."""
    return op_races(settings)


def test_op(lane: Lane, record: Callable[[Lane], None]) -> None:
    """One provider in one mode."""
    record(lane)
