"""What a loss is in the units that people compare."""

import math

# the largest power of e below fp64's largest number is between 709 and 710
_OVERFLOW = 709.0


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows.

    Args:
        loss: mean cross-entropy, nats per token (or per word, per byte).
    """
    return math.inf if loss > _OVERFLOW else math.exp(loss)
