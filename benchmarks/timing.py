"""How anything here is timed: alternating, cold caches, medians, ceilings of the same machine."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch

Work = Callable[[], object]

# several times the L2 cache of any GPU, or the last cache of a small CPU; writing it evicts what
# the work before has left there
_FLUSH_BYTES = 256 * 2**20
# the host queues a piece of work while the device sleeps, so that launching costs no device time
_HEAD_START_CYCLES = 2_000_000
ROUNDS = 5
MATMUL_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Timing:
    """Microseconds: the median and the 20th and 80th percentiles of ``rounds`` samples."""

    median_us: float
    p20_us: float
    p80_us: float
    rounds: int
    samples_us: tuple[float, ...]

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        """From single samples in microseconds."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        p20, p80 = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
        return cls(statistics.median(ordered), p20, p80, len(ordered), tuple(samples))


class Clock:
    """Times work on one device; without a GPU, by the host's clock.

    >>> Clock(torch.device("cuda")).compare({"a": f, "b": g}, seconds=0.5)
    """

    def __init__(
        self, device: torch.device, *, head_start: bool = True, rounds: int = ROUNDS
    ) -> None:
        self.on_gpu = device.type == "cuda"
        self.head_start, self.rounds = head_start, rounds
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

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
        self.flush.zero_()
        if not self.on_gpu:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e6
        before = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        after = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
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
    """What this machine reaches: bytes per second of a copy, FLOP per second of a large matmul.

    The latter by the operands' dtype.
    """

    bandwidth: float
    flops: Mapping[str, float]

    def roofline_us(self, flops: float, moved_bytes: float, dtype: str = "bf16") -> float:
        """The least time that work of so many operations and bytes takes here."""
        return max(flops / self.flops[dtype], moved_bytes / self.bandwidth) * 1e6


def measure_ceilings(clock: Clock, device: torch.device, *, seconds: float) -> Ceilings:
    """Time a device-to-device copy (read plus write) and square products of random data.

    Of at least ``seconds``; with none, tiny ones: a dry run's.
    """
    on_gpu, dry = device.type == "cuda", seconds == 0.0
    copied = 2**16 if dry else 2**30 if on_gpu else 2**28
    n = 64 if dry else 8192 if on_gpu else 2048
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    work: dict[str, Work] = {"copy": lambda: target.copy_(source)}
    for name, dtype in MATMUL_DTYPES.items():
        a, b, product = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
        work[name] = partial(torch.mm, a, b, out=product)
    times = clock.compare(work, seconds=seconds)
    return Ceilings(
        bandwidth=2.0 * copied / times["copy"].median_us * 1e6,
        flops={name: 2.0 * n**3 / times[name].median_us * 1e6 for name in MATMUL_DTYPES},
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
