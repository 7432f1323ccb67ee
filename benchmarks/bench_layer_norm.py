"""LayerNorm, alone and with the residual addition before it."""

from collections.abc import Callable

from benchmarks.harness import Lane, Race, Settings
from benchmarks.op_race import op_races


def races(settings: Settings) -> list[Race]:
    """A race for each op and size."""
    return op_races(settings, "layer_norm", "add_layer_norm", "add_branch")


def test_layer_norm(lane: Lane, record: Callable[[Lane], None]) -> None:
    """One provider in one mode."""
    record(lane)
