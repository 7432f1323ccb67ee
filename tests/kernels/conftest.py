"""Fixtures of the kernel tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from fastgpt2.kernels.backend import INTERPRETED
from tests.kernels.budget import DEVICE
from tests.kernels.interpreter import quicken
from tests.kernels.processors import PROCESSORS, Processor

if INTERPRETED:
    quicken()


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
def boolean_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask made of a scalar condition is a fault, as it is to the interpreter of Triton 3.9.

    There, a scalar that is broadcast to a tile is no longer boolean.
    """
    if not INTERPRETED:
        return
    for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
        method = getattr(interpreter.InterpreterBuilder, name)

        def checked(
            builder: Any, *arguments: Any, _method: Any = method, _position: int = position
        ) -> Any:
            kind = arguments[_position].data.dtype.kind
            assert kind == "b", f"a mask is of kind {kind}: a scalar condition is broadcast in it"
            return _method(builder, *arguments)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, checked)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers, alone or among others."""
    torch.manual_seed(1234)
