"""What the tests of the step in C++ share."""

import pytest
import torch

from fastgpt2.compiler import compiler_obstacle
from fastgpt2.generate.slots import Slots
from fastgpt2.model import GPT

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    compiler_obstacle(CPU) is not None, reason="needs a C++ compiler"
)


def compiled_slots(model: GPT, rows: int, size: int) -> Slots:
    slots = Slots(model, rows, size, compile=True)
    assert slots.compiled is not None
    return slots
