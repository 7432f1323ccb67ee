"""Learning-rate schedules: pure functions of the progress of training."""

import math
from collections.abc import Callable

# last share of training in which WSD decays (Hu et al., "MiniCPM", 2024, use 10-20 %)
WSD_DECAY = 0.2


def cosine(progress: float) -> float:
    """(1 + cos(pi p)) / 2."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """1 - p."""
    return 1.0 - progress


def constant(progress: float) -> float:
    """1."""
    return 1.0


def wsd(progress: float, decay: float = WSD_DECAY) -> float:
    """Warm-up, stable, decay: 1, then linearly to 0 over the last share ``decay``."""
    return min(1.0, (1.0 - progress) / decay)


# name -> factor of (lr - min_lr) at progress 0 .. 1 after the warm-up
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "wsd": wsd,
}


def learning_rate(
    schedule: str,
    step: int,
    progress: float,
    *,
    lr: float,
    min_lr: float,
    warmup_steps: int,
    wsd_decay: float = WSD_DECAY,
) -> float:
    """The learning rate of optimizer step ``step`` (from 0), ``progress`` in [0, 1] after warm-up.

    Warm-up: lr (step + 1) / (warmup_steps + 1). Then min_lr + (lr - min_lr) * schedule(progress).
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    progress = min(max(progress, 0.0), 1.0)
    factor = wsd(progress, wsd_decay) if schedule == "wsd" else SCHEDULES[schedule](progress)
    return min_lr + (lr - min_lr) * factor


def progress(
    step: int,
    elapsed: float,
    *,
    total_steps: int | None,
    warmup_steps: int,
    minutes: float | None,
) -> float:
    """How much of a run is done, 0 to 1: by steps or by time, whichever is further.

    Steps count from the end of the warm-up, as the schedules do; ``elapsed`` is in seconds.
    """
    by_steps = by_time = 0.0
    if total_steps is not None:
        # a run that is shorter than its warm-up still ends
        warmup = min(warmup_steps, total_steps - 1)
        by_steps = (step - warmup) / (total_steps - warmup)
    if minutes is not None:
        by_time = elapsed / (60.0 * minutes)
    return max(by_steps, by_time)
