"""How anything here is timed: alternating, cold caches, medians, ceilings of the same machine."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], object]

# several times the L2 cache of any GPU; writing it evicts what the work before has left there
_FLUSH_BYTES = 256 * 2**20
# the host queues a piece of work while the device sleeps, so that launching costs no device time
_HEAD_START_CYCLES = 2_000_000
ROUNDS = 5
_COPY_BYTES = 2**30
_MATMUL_SIZE = 8192


@dataclass(frozen=True)
class Timing:
    """Microseconds: the median and the 20th and 80th percentiles of ``rounds`` samples."""

    median_us: float
    p20_us: float
    p80_us: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        """From single samples in microseconds."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        p20, p80 = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
        return cls(statistics.median(ordered), p20, p80, len(ordered))


class Clock:
    """Times work on one device; without a GPU, by the host's clock.

    >>> Clock(torch.device("cuda")).compare({"a": f, "b": g}, seconds=0.5)
    """

    def __init__(
        self, device: torch.device, *, head_start: bool = True, rounds: int = ROUNDS
    ) -> None:
        self.on_gpu = device.type == "cuda"
        self.head_start, self.rounds = head_start, rounds
        size = _FLUSH_BYTES if self.on_gpu else 0
        self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def compare(self, work: Mapping[str, Work], *, seconds: float) -> dict[str, Timing]:
        """Time every entry in turn, for at least ``rounds`` rounds and until the time is used up.

        Each is called once before, so that compiling and warming up are not counted.
        """
        for run in work.values():
            run()
        self._wait()
        samples: dict[str, list[float]] = {name: [] for name in work}
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < self.rounds or time.perf_counter() < end:
            for name, run in work.items():
                samples[name].append(self._sample(run))
            rounds += 1
        return {name: Timing.of(values) for name, values in samples.items()}

    def _sample(self, run: Work) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e6
        before = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        after = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.flush.zero_()
        if self.head_start:
            torch.cuda._sleep(_HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
        before.record()
        run()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) * 1e3

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches: bytes per second of a copy, FLOP per second of a large matmul."""

    bandwidth: float
    flops: float

    def roofline_us(self, flops: float, moved_bytes: float) -> float:
        """The least time that work of so many operations and bytes takes here."""
        return max(flops / self.flops, moved_bytes / self.bandwidth) * 1e6


def measure_ceilings(clock: Clock, device: torch.device, *, seconds: float) -> Ceilings:
    """Time a device-to-device copy (read plus write) and a square bf16 product of random data."""
    small = device.type == "cpu"
    source = torch.randn((2**16 if small else _COPY_BYTES) // 2, device=device).bfloat16()
    target = torch.empty_like(source)
    n = 128 if small else _MATMUL_SIZE
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    product: Tensor = torch.empty_like(a)
    times = clock.compare(
        {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=product)},
        seconds=seconds,
    )
    moved = 2.0 * source.numel() * source.element_size()
    return Ceilings(
        bandwidth=moved / times["copy"].median_us * 1e6,
        flops=2.0 * n**3 / times["matmul"].median_us * 1e6,
    )


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version_of(package: str) -> str | None:
    try:
        return str(metadata.distribution(package).version)
    except metadata.PackageNotFoundError:
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to judge the numbers: device, clocks, driver, versions, commit."""
    query = "name,driver_version,clocks.sm,clocks.mem,power.limit"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "nvidia_smi": _output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **{name: _version_of(name) for name in ("torch", "triton", "transformers")},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "commit": _output_of("git", "rev-parse", "--short", "HEAD"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def as_json(timing: Timing) -> dict[str, float]:
    """The timing's fields."""
    return asdict(timing)
