"""What else ran during a race: other programs' processor time, and how often we were preempted.

The load average covers minutes and counts waiting programs. Here the processor time of all programs
(Linux's ``/proc/stat``) is read before and after a race, and our own is subtracted. On a system
without that file the disturbance is unknown.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
# user, nice, system, irq, softirq and steal in the first line of /proc/stat: busy time
_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
# a race is disturbed if other programs use more than this share of a core
QUIET_SHARE = 0.1


@dataclass(frozen=True)
class Disturbance:
    """Load of the rest of the machine during a race.

    Attributes:
        others: processor time of other programs over the race's duration, in cores; None if
            unknown.
        evictions: involuntary context switches of this process; None if unknown.
    """

    others: float | None
    evictions: int | None

    @property
    def is_disturbed(self) -> bool:
        """Whether other programs had more than ``QUIET_SHARE`` of a core."""
        return self.others is not None and self.others > QUIET_SHARE


def _everyones_seconds(stat: Path) -> float | None:
    try:
        fields = stat.read_text(encoding="utf-8").partition("\n")[0].split()[1:]
        return sum(int(fields[i]) for i in _BUSY_FIELDS) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _evictions() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class Watch:
    """Watches the rest of the machine, from its creation to ``seen``."""

    def __init__(self, stat: Path = _STAT) -> None:
        self._stat = stat
        self._start = time.perf_counter()
        self._everyone, self._own = _everyones_seconds(stat), _own_seconds()
        self._evictions = _evictions()

    def seen(self) -> Disturbance:
        """The disturbance so far."""
        everyone, evictions = _everyones_seconds(self._stat), _evictions()
        others = None
        if everyone is not None and self._everyone is not None:
            own = _own_seconds() - self._own
            wall = max(time.perf_counter() - self._start, 1e-9)
            others = max(0.0, (everyone - self._everyone - own) / wall)
        if evictions is not None and self._evictions is not None:
            evictions -= self._evictions
        return Disturbance(others, evictions)
