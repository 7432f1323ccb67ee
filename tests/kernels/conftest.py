"""Fixtures of the kernel tests."""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.budget import DEVICE


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


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers, alone or among others."""
    torch.manual_seed(1234)
