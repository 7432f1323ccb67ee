"""llm.c's ``.bin``: a header of 256 int32, then each parameter for all layers.

Version 3 holds float32, version 5 bfloat16; the token embedding is padded with zero rows to a
multiple of 128. Format: ``write_model`` in ``train_gpt2.py`` of https://github.com/karpathy/llm.c
"""

from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.files import atomic_path
from fastgpt2.weights.checkpoint import WTE, Checkpoint, parameter_shapes
from fastgpt2.weights.metadata import file_size, make_config
from fastgpt2.weights.tensors import LazyTensor, as_bytes, map_tensor

MAGIC = 20240326
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
VERSIONS = {3: torch.float32, 5: torch.bfloat16}
FIELDS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
VOCAB_MULTIPLE = 128

_BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def _order(n_layer: int) -> list[str]:
    """Names in the order of the file: one parameter of all blocks, then the next parameter."""
    names = [f"{module}.{kind}" for module in _BLOCK for kind in ("weight", "bias")]
    blocks = (f"transformer.h.{i}.{name}" for name in names for i in range(n_layer))
    ends = ("transformer.ln_f.weight", "transformer.ln_f.bias")
    return list(chain((WTE, "transformer.wpe.weight"), blocks, ends))


def _count(config: GPTConfig) -> int:
    """Number of parameters of a model with biases, without listing its layers."""
    C = config.n_embd
    return (config.vocab_size + config.block_size + 2) * C + config.n_layer * (12 * C + 13) * C


def read(path: Path) -> Checkpoint:
    """Open a ``.bin`` of llm.c; the padding of the vocabulary is removed."""
    try:
        available = file_size(path)
        with path.open("rb") as file:
            raw = file.read(HEADER_BYTES)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if len(raw) < HEADER_BYTES:
        raise UserError(f"{path}: truncated: {len(raw)} bytes, the header takes {HEADER_BYTES}")
    magic, version, *numbers = np.frombuffer(raw, "<i4")[:8].tolist()
    if magic != MAGIC:
        raise UserError(f"{path}: not a model of llm.c (magic number {magic}, expected {MAGIC})")
    if version not in VERSIONS:
        raise UserError(f"{path}: version {version} of llm.c's format; known: 3 (fp32), 5 (bf16)")
    *fields, padded = numbers
    config = make_config(path, **dict(zip(FIELDS, fields, strict=True)))
    if padded < config.vocab_size:
        raise UserError(f"{path}: padded vocabulary {padded} is less than {config.vocab_size}")
    dtype = VERSIONS[version]
    in_file = replace(config, vocab_size=padded)
    if available != (expected := HEADER_BYTES + _count(in_file) * dtype.itemsize):
        raise UserError(f"{path}: {available} bytes, the header asks for {expected}")
    shapes = parameter_shapes(in_file)
    tensors: dict[str, LazyTensor] = {}
    offset = HEADER_BYTES
    for name in _order(config.n_layer):
        tensors[name] = map_tensor(path, offset, shapes[name], dtype, name=name)
        offset += tensors[name].nbytes
    tensors[WTE] = tensors[WTE].rows(config.vocab_size)
    return Checkpoint(config, tensors, path, files=(path,))


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write a ``.bin`` for llm.c: version 5 for a bfloat16 checkpoint, else version 3."""
    checkpoint = checkpoint.with_biases()
    if checkpoint.dtype != torch.bfloat16:
        checkpoint = checkpoint.to(torch.float32)
    config = checkpoint.config
    padding = -config.vocab_size % VOCAB_MULTIPLE
    version = next(number for number, dtype in VERSIONS.items() if dtype == checkpoint.dtype)
    header = np.zeros(HEADER_INTS, "<i4")
    fields = [getattr(config, name) for name in FIELDS]
    header[:8] = [MAGIC, version, *fields, config.vocab_size + padding]
    with atomic_path(path, new=True) as temporary, temporary.open("wb") as file:
        file.write(header.tobytes())
        for name in _order(config.n_layer):
            file.write(as_bytes(checkpoint.tensors[name].read()))
            if name == WTE:
                file.write(bytes(padding * config.n_embd * checkpoint.dtype.itemsize))
