"""Hugging Face's folder: ``config.json`` and safetensors (or ``pytorch_model.bin``).

Format: ``GPT2LMHeadModel`` of https://github.com/huggingface/transformers. Its ``Conv1D`` weights
are (in, out), the transpose of ours; files of the bare ``GPT2Model`` lack the prefix
``transformer.``, and old ones hold the causal mask as ``attn.bias``.
"""

import json
import re
from pathlib import Path
from typing import Any

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.files import write_text
from fastgpt2.weights.checkpoint import HEAD, Checkpoint, drop_tied_head
from fastgpt2.weights.metadata import inside, make_config, read_json, require, shown
from fastgpt2.weights.safetensors_file import read_safetensors, write_safetensors
from fastgpt2.weights.tensors import LazyTensor
from fastgpt2.weights.torch_file import lazy_tensors, read_torch

SIZES = {
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
DROPOUTS = {
    "attn_dropout": "attn_pdrop",
    "embd_dropout": "embd_pdrop",
    "resid_dropout": "resid_pdrop",
}
# transformers' default when config.json has no rate
DEFAULT_DROPOUT = 0.1
END_OF_TEXT = 50256
# options of transformers' GPT-2, with the values of OpenAI's GPT-2. reorder_and_upcast_attn is not
# listed: it computes the scores in fp32, as we always do
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "quantization_config": (None,),
}
# transformers' name of a GELU -> ours; the first name of each form is the one we write
ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}
ACTIVATION = "activation_function"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
CONV1D = re.compile(r"transformer\.h\.\d+\.(attn|mlp)\.c_\w+\.weight")
MASK = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias")


def _read_config(path: Path) -> GPTConfig:
    record = read_json(path)
    for key, allowed in FIXED.items():
        value = record.get(key, allowed[0])
        if value not in allowed:
            raise UserError(
                f"{path}: {key} = {shown(value)} is not GPT-2's {allowed[0]!r}: unsupported"
            )
    activation = record.get(ACTIVATION, "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UserError(
            f"{path}: {ACTIVATION} = {shown(activation)} is not one of {', '.join(ACTIVATIONS)}: "
            "unsupported"
        )
    sizes = {ours: require(record, theirs, path) for ours, theirs in SIZES.items()}
    rates = {ours: record.get(theirs, DEFAULT_DROPOUT) for ours, theirs in DROPOUTS.items()}
    # one common rate becomes `dropout`
    common = len(set(map(repr, rates.values()))) == 1
    dropouts = {"dropout": rates["attn_dropout"]} if common else rates
    config = make_config(path, **sizes, **dropouts, gelu=ACTIVATIONS[activation])
    if record.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(
            f"{path}: n_inner = {shown(record['n_inner'])}, expected {4 * config.n_embd}"
        )
    return config


def _read_file(path: Path) -> dict[str, LazyTensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return lazy_tensors(path, read_torch(path))


def _read_shards(path: Path) -> tuple[dict[str, LazyTensor], tuple[Path, ...]]:
    weight_map = require(read_json(path), "weight_map", path)
    if not isinstance(weight_map, dict):
        raise UserError(f"{path}: 'weight_map' must name the file of each tensor")
    shards: dict[Path, dict[str, LazyTensor]] = {}
    tensors = {}
    for name, file in weight_map.items():
        shard = inside(path.parent, file)
        if shard not in shards:
            shards[shard] = _read_file(shard)
        if name not in shards[shard]:
            raise UserError(f"{shard}: missing {shown(name)}, which {path.name} places there")
        tensors[name] = shards[shard][name]
    return tensors, tuple(sorted(shards))


def _canonical(name: str) -> str:
    return name if name == HEAD or name.startswith("transformer.") else f"transformer.{name}"


def read(folder: Path) -> Checkpoint:
    """Open a folder in Hugging Face's format, in one file or sharded.

    Raises:
        UserError: an option in ``config.json`` that GPT-2 does not have, or damaged files.
    """
    config = _read_config(folder / "config.json")
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: none of {', '.join(WEIGHTS)}")
    if path.suffix == ".json":
        found, files = _read_shards(path)
    else:
        found, files = _read_file(path), (path,)
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in found.items():
        name = _canonical(name)
        if name in tensors:
            raise UserError(f"{path}: {shown(name)} occurs twice")
        if not MASK.fullmatch(name):
            tensors[name] = tensor.transposed() if CONV1D.fullmatch(name) else tensor
    return Checkpoint(config, drop_tied_head(tensors, path), path, files=files)


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a folder that ``GPT2LMHeadModel.from_pretrained`` loads."""
    checkpoint = checkpoint.with_biases()
    tensors = {
        name: tensor.transposed() if CONV1D.fullmatch(name) else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    config = checkpoint.config
    end = END_OF_TEXT if config.vocab_size > END_OF_TEXT else None
    record = {
        "architectures": ["GPT2LMHeadModel"],
        **{key: allowed[0] for key, allowed in FIXED.items() if allowed[0] is not None},
        ACTIVATION: next(name for name, form in ACTIVATIONS.items() if form == config.gelu),
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "n_ctx": config.block_size,
        "n_inner": None,
        "attn_pdrop": config.attn_p,
        "embd_pdrop": config.embd_p,
        "resid_pdrop": config.resid_p,
        "initializer_range": 0.02,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": str(checkpoint.dtype).removeprefix("torch."),
    }
    write_text(folder / "config.json", json.dumps(record, indent=2, sort_keys=True) + "\n")
