"""Timing: alternating contenders, cold caches, medians, and the machine's ceilings."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch

Work = Callable[[], object]

# several times the L2 cache of any GPU, or the last-level cache of a small CPU; writing it evicts
# what earlier work left there
FLUSH_BYTES = 256 * 2**20
# writing that much takes longer than a dry run's work, whose times mean nothing
DRY_FLUSH_BYTES = 2**16
# the device sleeps while the host queues work, so that launching takes no measured time
_HEAD_START_CYCLES = 2_000_000
ROUNDS = 5
MATMUL_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Timing:
    """Samples in seconds, in measured order; median, 20th and 80th percentile."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the samples, in seconds."""
        return statistics.median(self.samples)

    @cached_property
    def _ordered(self) -> list[float]:
        return sorted(self.samples)

    def percentile(self, share: float) -> float:
        """The sample that ``share`` (0 to 1) of the others do not exceed."""
        return self._ordered[round(share * (len(self.samples) - 1))]

    @property
    def p20(self) -> float:
        """The 20th percentile, in seconds."""
        return self.percentile(0.2)

    @property
    def p80(self) -> float:
        """The 80th percentile, in seconds."""
        return self.percentile(0.8)


class Clock:
    """Times work on one device; on a CPU with the host's clock.

    >>> Clock(torch.device("cuda")).compare({"a": f, "b": g}, seconds=0.5)
    """

    def __init__(
        self,
        device: torch.device,
        *,
        head_start: bool = True,
        rounds: int = ROUNDS,
        flush_bytes: int = FLUSH_BYTES,
    ) -> None:
        self.on_gpu = device.type == "cuda"
        self.head_start, self.rounds = head_start, rounds
        self.flush = torch.empty(flush_bytes, dtype=torch.int8, device=device)

    def compare(self, work: Mapping[str, Work], *, seconds: float) -> dict[str, Timing]:
        """Time every entry in turn, for at least ``rounds`` rounds and ``seconds`` seconds.

        Work that compiles or allocates on its first call must have been called before.
        """
        if self.on_gpu:
            torch.cuda.synchronize()
        samples: dict[str, list[float]] = {name: [] for name in work}
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < self.rounds or time.perf_counter() < end:
            for name, run in work.items():
                samples[name].append(self._sample(run))
            rounds += 1
        return {name: Timing(tuple(values)) for name, values in samples.items()}

    def _sample(self, run: Work) -> float:
        self.flush.zero_()
        if not self.on_gpu:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        before = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        after = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        if self.head_start:
            torch.cuda._sleep(_HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
        before.record()
        run()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / 1e3


@dataclass(frozen=True)
class Ceilings:
    """This machine's peaks: bytes/s of a copy, and FLOP/s of a large matmul by operand dtype."""

    bandwidth: float
    flops: Mapping[str, float]

    def roofline(self, flops: float, moved_bytes: float, dtype: str) -> float:
        """The fewest seconds for so many operations and bytes on this machine."""
        return max(flops / self.flops[dtype], moved_bytes / self.bandwidth)


def measure_ceilings(clock: Clock, device: torch.device, *, seconds: float) -> Ceilings:
    """Time a device-to-device copy (read plus write) and square products of random data.

    It takes at least ``seconds``; with 0, for a dry run, the sizes are tiny.
    """
    on_gpu, dry = device.type == "cuda", seconds == 0.0
    copied = 2**16 if dry else 2**30 if on_gpu else 2**28
    largest = 64 if dry else 8192 if on_gpu else 2048
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    work: dict[str, Work] = {"copy": lambda: target.copy_(source)}
    sizes = {}
    for name, dtype in MATMUL_DTYPES.items():
        sizes[name], work[name] = _square_product(dtype, device, largest)
    for run in work.values():
        run()
    times = clock.compare(work, seconds=seconds)
    return Ceilings(
        bandwidth=2.0 * copied / times["copy"].median,
        flops={name: 2.0 * n**3 / times[name].median for name, n in sizes.items()},
    )


def _square_product(dtype: torch.dtype, device: torch.device, largest: int) -> tuple[int, Work]:
    """n, and a product of two random (n, n) matrices.

    On a CPU, n is the largest size that takes about a tenth of a second: a processor without bf16
    instructions is hundreds of times slower in bf16.
    """
    n = largest if device.type == "cuda" else 64
    while True:
        a, b, product = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        if n == largest or time.perf_counter() - start > 0.02:
            return n, partial(torch.mm, a, b, out=product)
        n *= 2
