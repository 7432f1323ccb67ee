"""Memory of a call, by PyTorch's profiler."""

from collections.abc import Callable

import torch


def profiled_peak(call: Callable[[], object]) -> int:
    """Bytes that are allocated at most at one time during the call, beside what was there."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        now += int(change)
        peak = max(peak, now)
    return peak
