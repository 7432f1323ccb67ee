"""What the tests of the weights share: small models and OpenAI's golden folder."""

import shutil
from pathlib import Path

import pytest
import torch

from fastgpt2.config import GPTConfig
from fastgpt2.weights.checkpoint import Checkpoint, parameter_shapes
from fastgpt2.weights.tensors import LazyTensor

GOLDEN = Path(__file__).parents[1] / "golden" / "openai-tiny"


@pytest.fixture
def openai_folder(tmp_path: Path) -> Path:
    """A copy of the golden folder, to be damaged."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "openai"))


def random_checkpoint(config: GPTConfig, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Random weights, biases and LayerNorm gains included."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: LazyTensor.of((0.1 * torch.randn(shape, generator=generator)).to(dtype))
        for name, shape in parameter_shapes(config).items()
    }
    return Checkpoint(config, tensors, Path("random"))


def same_bits(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    return list(a.tensors) == list(b.tensors) and all(
        a.tensors[name].dtype == b.tensors[name].dtype
        and torch.equal(*(c.tensors[name].read().contiguous().view(torch.uint8) for c in (a, b)))
        for name in a.tensors
    )
