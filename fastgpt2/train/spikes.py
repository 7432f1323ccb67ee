"""Loss spikes: a loss that is far above the losses before it."""

import math
from collections import deque
from collections.abc import Iterable
from statistics import fmean, stdev

# what a run can do about a spike
ON_SPIKE = ("warn", "rollback")
# the most and the fewest losses to compare with, and the standard deviations that make a spike
WINDOW, _LEAST, LIMIT = 100, 20, 6.0


class Spikes:
    """The last losses, of which a new one may be an outlier.

    Args:
        losses: those before, the newest one last.
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses: deque[float] = deque(losses, maxlen=WINDOW)

    @property
    def losses(self) -> list[float]:
        """The losses that a new one is compared with."""
        return list(self._losses)

    def score(self, loss: float) -> float | None:
        """(loss - mean) / standard deviation of the losses before, if that is a spike, else None.

        Later losses are not compared with a spike, or with a loss that is not finite.

        Args:
            loss: loss of a step, in nats per token.
        """
        if not math.isfinite(loss):
            return None
        if len(self._losses) >= _LEAST:
            # equal losses have a deviation of zero
            deviation = max(stdev(self._losses), 1e-6)
            score = (loss - fmean(self._losses)) / deviation
            if score > LIMIT:
                return score
        self._losses.append(loss)
        return None

    def clear(self) -> None:
        """Forget the losses."""
        self._losses.clear()
