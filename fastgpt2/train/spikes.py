"""A loss that jumps: found by how far it is from the losses before it."""

import math
from collections import deque
from statistics import fmean, stdev

# what a run does about one
ON_SPIKE = ("warn", "rollback")
# losses that one is compared with, how many there must be, and too many standard deviations
WINDOW, _LEAST, LIMIT = 100, 20, 6.0


class Spikes:
    """The last losses, of which a new one may be an outlier."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def score(self, loss: float) -> float | None:
        """(loss - mean) / standard deviation of the losses before, if that is a spike, else None.

        A spike, or a loss that is not finite, is not compared with later ones.

        Args:
            loss: of a step, in nats per token.
        """
        if not math.isfinite(loss):
            return None
        if len(self._losses) >= _LEAST:
            # losses that are all the same have no deviation of their own
            deviation = max(stdev(self._losses), 1e-6)
            score = (loss - fmean(self._losses)) / deviation
            if score > LIMIT:
                return score
        self._losses.append(loss)
        return None

    def clear(self) -> None:
        """Forget the losses."""
        self._losses.clear()
