"""``--profile STEPS``: where the time of a training step goes, as a trace and a table.

The profiler is PyTorch's. ``RUN/trace.json`` opens in chrome://tracing or ui.perfetto.dev.
"""

from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastgpt2 import distributed
from fastgpt2.devices import device_kind
from fastgpt2.files import atomic_path, write_text

TRACE, TABLE = "trace.json", "profile.txt"
# steps before the first one that counts: they allocate memory and compile kernels
WARMUP = 3
# the named parts of a step, in order
PHASES = ("data", "forward", "backward", "update")
_ROWS = 12


class StepProfile:
    """Records some steps of a run, once; an error becomes one line, and the run goes on.

    Args:
        steps: how many to record; 0 means none.
        run: the run folder.
        device: where the model is.
        notify: shows the table.
    """

    def __init__(
        self, steps: int, run: Path, device: torch.device, notify: Callable[[str], None]
    ) -> None:
        # only the first of several processes records
        self._steps = steps if distributed.rank() == 0 else 0
        self._run, self._device, self._notify = run, device, notify
        self._seen = 0
        self._profiler: Any = None

    def step(self) -> None:
        """Tell that a step of training begins."""
        if not self._steps:
            return
        if self._seen == WARMUP:
            self._guarded(self._start)
        elif self._seen == WARMUP + self._steps:
            self.close()
        self._seen += 1

    def close(self) -> None:
        """Write trace and table of the recorded steps, if that has not happened yet."""
        if self._profiler is not None:
            self._guarded(self._finish)
        elif self._steps and self._seen:
            self._notify(f"profile: nothing recorded; the first {WARMUP} steps are for warm-up")
        self._steps = 0

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if device_kind(self._device).cuda:
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def _finish(self) -> None:
        profiler, self._profiler = self._profiler, None
        count = min(self._steps, self._seen - WARMUP)
        profiler.stop()
        with atomic_path(self._run / TRACE) as temporary:
            profiler.export_chrome_trace(str(temporary))
        table = step_table(profiler.key_averages(), count)
        write_text(self._run / TABLE, table)
        self._notify(f"{table}profile: {self._run / TRACE}, {self._run / TABLE}")

    def _guarded(self, body: Callable[[], None]) -> None:
        try:
            body()
        except Exception as error:
            self._steps, self._profiler = 0, None
            reason = shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
            self._notify(f"profile: failed ({reason}); training goes on without it")


def step_table(averages: Any, steps: int) -> str:
    """Milliseconds per step by phase, then of the operators that take the most time themselves.

    Args:
        averages: the result of ``torch.profiler``'s ``key_averages()``.
        steps: number of steps recorded.
    """
    host = {event.key: event for event in averages if event.device_type.name == "CPU"}
    on_device = any(event.self_device_time_total for event in averages)
    lines = [f"{steps} steps recorded; ms per step{': host, device' if on_device else ''}"]

    def line(name: str, calls: int, host_us: float, device_us: float) -> str:
        times = (host_us, device_us) if on_device else (host_us,)
        return f"  {_both_ends(name):<44} {calls / steps:>8.4g} x" + "".join(
            f" {time / 1e3 / steps:>10.3f}" for time in times
        )

    phases = [host[name] for name in PHASES if name in host]
    lines += [line(e.key, e.count, e.cpu_time_total, e.device_time_total) for e in phases]
    lines.append("operators, by their own time:")
    others = [e for e in averages if e.key not in PHASES]
    key = "self_device_time_total" if on_device else "self_cpu_time_total"
    for e in sorted(others, key=lambda e: -getattr(e, key))[:_ROWS]:
        lines.append(line(e.key, e.count, e.self_cpu_time_total, e.self_device_time_total))
    return "\n".join(lines) + "\n"


def _both_ends(name: str) -> str:
    """A name in 44 characters: what an operator belongs to, and which one it is."""
    return name if len(name) <= 44 else f"{name[:20]}...{name[-21:]}"
