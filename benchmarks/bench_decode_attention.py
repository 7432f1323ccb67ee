"""One query a sequence against a full key/value cache."""

from collections.abc import Callable

from benchmarks.harness import Lane, Race, Settings
from benchmarks.op_race import op_races


def races(settings: Settings) -> list[Race]:
    """A race for each op and size."""
    return op_races(settings, "decode_attention")


def test_decode_attention(lane: Lane, record: Callable[[Lane], None]) -> None:
    """One provider in one mode."""
    record(lane)
