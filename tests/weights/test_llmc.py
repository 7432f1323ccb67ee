"""llm.c's .bin, byte by byte."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt2.config import GPTConfig
from fastgpt2.weights import Checkpoint, load, save
from fastgpt2.weights.checkpoint import parameter_shapes
from tests.weights.conftest import TINY, random_checkpoint, same_bits


def llmc_bytes(checkpoint: Checkpoint, version: int, padded: int) -> bytes:
    """A file as llm.c's write_model makes it, parameter by parameter."""
    config = checkpoint.config
    numbers = (20240326, version, config.block_size, config.vocab_size, config.n_layer)
    header = np.zeros(256, np.int32)
    header[:8] = [*numbers, config.n_head, config.n_embd, padded]
    dtype = torch.float32 if version == 3 else torch.bfloat16

    def raw(name: str) -> bytes:
        tensor = checkpoint.tensors[name].read().to(dtype).contiguous()
        return tensor.view(torch.uint8).numpy().tobytes()

    out = header.tobytes() + raw("transformer.wte.weight")
    out += bytes((padded - config.vocab_size) * config.n_embd * dtype.itemsize)
    out += raw("transformer.wpe.weight")
    for name in (
        "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias",
        "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias",
        "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
    ):  # fmt: skip
        for layer in range(config.n_layer):
            out += raw(f"transformer.h.{layer}.{name}")
    return out + raw("transformer.ln_f.weight") + raw("transformer.ln_f.bias")


@pytest.mark.parametrize(("version", "dtype"), [(3, torch.float32), (5, torch.bfloat16)])
def test_llmc_bytes(tmp_path: Path, version: int, dtype: torch.dtype) -> None:
    checkpoint = random_checkpoint(TINY, dtype)
    expected = llmc_bytes(checkpoint, version, 128)
    path = save(checkpoint, tmp_path / "gpt2.bin", "llmc")
    assert path.read_bytes() == expected
    assert same_bits(load(path), checkpoint)


def test_llmc_size_of_the_124m_release() -> None:
    # gpt2_124M.bin has 497,904,640 bytes and 124,475,904 parameters, padding included
    shapes = parameter_shapes(GPTConfig(vocab_size=50304))
    assert sum(np.prod(shape) for shape in shapes.values()) == 124_475_904
    assert 1024 + 4 * 124_475_904 == 497_904_640
