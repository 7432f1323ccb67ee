"""How the cost of a training step grows with the model, the context and the batch.

One axis at a time. The rival is the plain GPT, compiled, on a GPU. On a CPU it is the one like
nanoGPT, eager, because compiling each point would take longer than all steps. Along T the tokens
per step stay the same, so that only attention grows.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.bench_train_step import COMPILED, TrainStep, Workload
from benchmarks.harness import Lane, Race, Scale, Settings, compute_dtype
from benchmarks.timing import Ceilings
from fastgpt2.config import GPTConfig

Point = tuple[str, str | int, Workload]


class GrowthRace(TrainStep):
    """A training step at one point of one axis."""

    def __init__(
        self, axis: str, value: str | int, workload: Workload, contenders: tuple[str, ...]
    ) -> None:
        super().__init__(workload, contenders)
        self.axis, self.value = axis, value
        # a point that two axes share is measured on both, each with its neighbours
        self.group = f"growth with {axis} at {value}"

    def facts(self, name: str, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
        """The facts of the training step, and the place on the axis."""
        place = {"axis": self.axis, "value": self.value}
        return place | super().facts(name, seconds, ceilings)


def points(scale: Scale) -> list[Point]:
    """Axis, place on it, and the workload there."""

    def at(model: str, B: int, T: int) -> Workload:
        config = GPTConfig.preset(model, block_size=T)
        return Workload(config, B, T, compute_dtype(scale))

    if scale is Scale.DRY:
        config = GPTConfig(block_size=8, vocab_size=31, n_layer=1, n_head=2, n_embd=32)
        return [("B", B, Workload(config, B, 8, torch.float32)) for B in (1, 2)]
    if scale is Scale.CPU:
        sizes = [("gpt2-micro", 1, 256), ("gpt2-mini", 1, 256), ("gpt2", 1, 256)]
        lengths = [("gpt2-mini", 1024 // T, T) for T in (256, 512, 1024)]
        batches = [("gpt2-mini", B, 128) for B in (1, 4, 8)]
    else:
        names = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
        sizes = [(name, 8, 1024) for name in names]
        lengths = [("gpt2", 16384 // T, T) for T in (256, 512, 1024, 2048, 4096)]
        batches = [("gpt2", B, 1024) for B in (1, 2, 4, 8, 16, 32, 64)]
    return [
        *(("model", model, at(model, B, T)) for model, B, T in sizes),
        *(("T", T, at(model, B, T)) for model, B, T in lengths),
        *(("B", B, at(model, B, T)) for model, B, T in batches),
    ]


def races(settings: Settings) -> list[Race]:
    """A race at each point of each axis."""
    on_gpu = settings.scale is Scale.CUDA
    pair = (f"fastgpt2{COMPILED}", f"plain{COMPILED}") if on_gpu else ("fastgpt2", "nanogpt")
    return [GrowthRace(*point, pair) for point in points(settings.scale)]


def test_growth(lane: Lane, record: Callable[[Lane], None]) -> None:
    """One contender at one point."""
    record(lane)
