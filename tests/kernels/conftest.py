"""Fixtures of the kernel tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.budget import DEVICE
from tests.kernels.processors import PROCESSORS, Processor


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run: the GPU, or the CPU under the interpreter."""
    return DEVICE


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    """Fresh memory is NaN (integers: the largest value), so whoever forgets to write it is seen.

    PyTorch does this itself in deterministic mode, for empty, empty_like, new_empty and friends.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=PROCESSORS, ids=lambda processor: processor.name)
def processor(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Processor:
    """The test runs as on each of these processors, whatever the machine is."""
    chosen: Processor = request.param
    chosen.install(monkeypatch, tmp_path)
    return chosen


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers, alone or among others."""
    torch.manual_seed(1234)
