"""What the tests of the weights share: small models and OpenAI's golden folder."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt2.config import GPTConfig
from fastgpt2.model import GPT
from fastgpt2.weights.checkpoint import Checkpoint, parameter_shapes
from fastgpt2.weights.tensors import LazyTensor

TINY = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32)
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


def hf_model(config: GPTConfig, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            bos_token_id=None,
            eos_token_id=None,
            **options,
        )
    )
    # transformers starts biases at 0 and gains at 1, which would hide that they are ignored
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def hf_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    return logits


def our_logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return GPT.from_pretrained(str(path)).eval().logits(tokens)
