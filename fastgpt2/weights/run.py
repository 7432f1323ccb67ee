"""Our own folders as a format: a checkpoint, or the best one of a run.

``fastgpt2.runs`` defines the files. A quantized checkpoint has the same files: a matrix
``NAME.weight`` (F, C) is I8, and ``NAME.scales`` (F,) in F32 holds the scale of each row.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from fastgpt2 import runs
from fastgpt2.config import GPTConfig, unknown_key
from fastgpt2.errors import UserError
from fastgpt2.files import write_text
from fastgpt2.quantize import dequantize_rows, quantize_rows
from fastgpt2.weights import adapter
from fastgpt2.weights.checkpoint import Checkpoint
from fastgpt2.weights.metadata import make_config, read_json, shown
from fastgpt2.weights.safetensors_file import read_safetensors, write_safetensors
from fastgpt2.weights.shards import WEIGHTS, read_shards
from fastgpt2.weights.tensors import LazyTensor


def read(folder: Path) -> Checkpoint:
    """Open a checkpoint folder, or the best one of a run."""
    if (folder / runs.CHECKPOINTS).is_dir():
        folder = runs.best(folder)
    config = _config(folder)
    if (folder / runs.ADAPTER).is_file():
        return adapter.read(folder, config)
    if (folder / runs.SHARDS).is_dir():
        found = read_shards(folder / runs.SHARDS, config.vocab_size).items()
        weights = {k.removeprefix(WEIGHTS): x for k, x in found if k.startswith(WEIGHTS)}
        files = sorted((folder / runs.SHARDS).glob("*.safetensors"))
        return Checkpoint(config, weights, folder, files=tuple(files))
    tensors = read_safetensors(folder / runs.MODEL)
    quantization = dequantize(tensors, folder / runs.MODEL)
    return Checkpoint(
        config, tensors, folder, files=(folder / runs.MODEL,), quantization=quantization
    )


def _config(folder: Path) -> GPTConfig:
    path = folder / runs.MODEL_CONFIG
    record = read_json(path)
    known = [field.name for field in fields(GPTConfig)]
    for key in record:
        if key not in known:
            raise unknown_key(key, known, str(path))
    return make_config(path, **record)


def write(checkpoint: Checkpoint, run: Path) -> None:
    """Write a run folder with one checkpoint, of step 0, without training state."""
    folder = runs.step_folder(run, 0)
    folder.mkdir(parents=True)
    tensors = dict(checkpoint.tensors)
    metadata = {"format": "pt"}
    if checkpoint.quantization is not None:
        for name in (name for name in checkpoint.tensors if _is_quantized(checkpoint, name)):
            _quantize(tensors, name)
        metadata["quantization"] = checkpoint.quantization
    write_safetensors(folder / runs.MODEL, tensors, metadata)
    write_text(folder / runs.MODEL_CONFIG, json.dumps(asdict(checkpoint.config), indent=2) + "\n")
    write_text(folder / runs.STATE, json.dumps({"step": 0}) + "\n")


def _is_quantized(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is quantized: all matrices except the position embedding."""
    return len(checkpoint.tensors[name].shape) == 2 and name != "transformer.wpe.weight"


def _scales_of(name: str) -> str:
    return name.removesuffix("weight") + "scales"


def _quantize(tensors: dict[str, LazyTensor], name: str) -> None:
    """Replace a matrix by its integers and their scales."""
    weight = tensors[name]

    def integers() -> Tensor:
        return quantize_rows(weight.read())[0]

    def scales() -> Tensor:
        return quantize_rows(weight.read())[1]

    tensors[name] = LazyTensor(weight.shape, torch.int8, integers)
    tensors[_scales_of(name)] = LazyTensor(weight.shape[:1], torch.float32, scales)


def dequantize(tensors: dict[str, LazyTensor], path: Path) -> str | None:
    """Replace integers and their scales by the dequantized matrices.

    Args:
        tensors: by name; changed in place.
        path: whose tensors they are, for error messages.

    Returns:
        How they were stored: ``int8``, or None if nothing was quantized.

    Raises:
        UserError: scales are missing, or do not fit.
    """
    quantized = [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]
    for name in quantized:
        _dequantize(tensors, name, path)
    return "int8" if quantized else None


def _dequantize(tensors: dict[str, LazyTensor], name: str, path: Path) -> None:
    """Replace integers and their scales by the dequantized matrix."""
    integers, scales = tensors[name], tensors.pop(_scales_of(name), None)
    if scales is None:
        raise UserError(f"{path}: {shown(name)} is int8, but its scales are missing")
    if len(integers.shape) != 2 or scales.shape != integers.shape[:1]:
        raise UserError(
            f"{path}: {shown(name)} has shape {integers.shape}, its scales {scales.shape}"
        )
    if scales.dtype != torch.float32:
        raise UserError(f"{path}: the scales of {shown(name)} must be float32, got {scales.dtype}")

    def weight() -> Tensor:
        return dequantize_rows(integers.read(), scales.read())

    tensors[name] = LazyTensor(integers.shape, torch.float32, weight)
