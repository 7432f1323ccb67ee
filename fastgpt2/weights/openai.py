"""OpenAI's release format: a TensorFlow checkpoint, ``hparams.json`` and the vocabulary.

It is the folder ``models/124M`` of https://github.com/openai/gpt-2: ``checkpoint`` names the files
``model.ckpt.index`` and ``model.ckpt.data-*``; ``hparams.json`` has the shape of the model. A
"convolution" of width 1 stores its matrix as [1, in, out], the transpose of ours.
"""

import json
import re
from pathlib import Path

import torch

from fastgpt2.errors import UserError
from fastgpt2.files import write_text
from fastgpt2.weights.checkpoint import Checkpoint, listed, parameter_shapes
from fastgpt2.weights.metadata import MAX_JSON_BYTES, inside, make_config, read_json, require
from fastgpt2.weights.tensors import LazyTensor, check_total
from fastgpt2.weights.tf_bundle import Bundle, write_bundle

HPARAMS = {
    "vocab_size": "n_vocab",
    "block_size": "n_ctx",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
# our names and OpenAI's, without "transformer." and "model/" or the name of the block
_NAMES = {
    "wte.weight": "wte",
    "wpe.weight": "wpe",
    "ln_1.weight": "ln_1/g",
    "ln_1.bias": "ln_1/b",
    "attn.c_attn.weight": "attn/c_attn/w",
    "attn.c_attn.bias": "attn/c_attn/b",
    "attn.c_proj.weight": "attn/c_proj/w",
    "attn.c_proj.bias": "attn/c_proj/b",
    "ln_2.weight": "ln_2/g",
    "ln_2.bias": "ln_2/b",
    "mlp.c_fc.weight": "mlp/c_fc/w",
    "mlp.c_fc.bias": "mlp/c_fc/b",
    "mlp.c_proj.weight": "mlp/c_proj/w",
    "mlp.c_proj.bias": "mlp/c_proj/b",
    "ln_f.weight": "ln_f/g",
    "ln_f.bias": "ln_f/b",
}


def openai_name(name: str) -> str:
    """``transformer.h.0.attn.c_attn.weight`` -> ``model/h0/attn/c_attn/w``."""
    name = name.removeprefix("transformer.")
    if name.startswith("h."):
        _, block, rest = name.split(".", 2)
        return f"model/h{block}/{_NAMES[rest]}"
    return f"model/{_NAMES[name]}"


def newest_checkpoint(folder: Path) -> Path:
    """Path of the newest TensorFlow checkpoint in ``folder``, without its suffixes.

    Args:
        folder: holds a checkpoint, and perhaps TensorFlow's file ``checkpoint`` that names it.

    Raises:
        UserError: there is none, or several and none of them is named.
    """
    path = folder / "checkpoint"
    if path.is_file():
        try:
            # the first line names it; the others list older checkpoints
            with path.open(encoding="utf-8-sig") as file:
                text = file.read(MAX_JSON_BYTES)
            found = re.search(r'^model_checkpoint_path: "([^"\n]+)"', text, re.MULTILINE)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}") from None
        if found is None:
            raise UserError(f"{path}: no line model_checkpoint_path")
        # TensorFlow writes the full path on the machine that saved; the files are in this folder
        return inside(folder, re.split(r"[/\\]", found[1])[-1])
    indices = sorted(folder.glob("*.index"))
    if len(indices) != 1:
        raise UserError(f"{folder}: no file 'checkpoint' and {len(indices)} files *.index")
    return indices[0].with_suffix("")


def read(folder: Path) -> Checkpoint:
    """Open a folder in OpenAI's format. Variables that are not GPT-2's (optimizer slots, step
    counters) are left out and listed in the notes."""
    path = folder / "hparams.json"
    hparams = read_json(path)
    config = make_config(
        path, **{ours: require(hparams, theirs, path) for ours, theirs in HPARAMS.items()}
    )
    bundle = Bundle(newest_checkpoint(folder))
    if config.n_layer > len(bundle.entries):
        raise UserError(
            f"{path}: n_layer is {config.n_layer}, "
            f"but {bundle.index} has {len(bundle.entries)} variables"
        )
    tensors: dict[str, LazyTensor] = {}
    for name, shape in parameter_shapes(config).items():
        variable = openai_name(name)
        matrix = len(shape) == 2 and variable.endswith("/w")
        expected = (1, *shape[::-1]) if matrix else shape
        tensor = bundle.tensor(variable)
        if tensor.shape != expected:
            raise UserError(
                f"{bundle.index}: {variable!r} has shape {tensor.shape}, "
                f"{path.name} asks for {expected}"
            )
        tensors[name] = tensor.reshaped(*expected[1:]).transposed() if matrix else tensor
    known = {openai_name(name) for name in tensors}
    files = {bundle.shard(name) for name in known}
    check_total(tensors.values(), files, bundle.index)
    unknown = [name for name in bundle.entries if name not in known]
    notes = (f"ignored what is not a weight of GPT-2: {listed(unknown)}",)
    return Checkpoint(config, tensors, folder, notes if unknown else (), tuple(sorted(files)))


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a folder in OpenAI's format; values are stored as float32, which is exact."""
    checkpoint = checkpoint.with_biases().to(torch.float32)
    variables = {}
    for name, tensor in checkpoint.tensors.items():
        variable = openai_name(name)
        if variable.endswith("/w"):
            tensor = tensor.transposed().reshaped(1, *tensor.shape[::-1])
        variables[variable] = tensor
    write_bundle(folder / "model.ckpt", variables)
    hparams = {theirs: getattr(checkpoint.config, ours) for ours, theirs in HPARAMS.items()}
    write_text(folder / "hparams.json", json.dumps(hparams))
    line = 'model_checkpoint_path: "model.ckpt"\n'
    write_text(folder / "checkpoint", line + "all_" + line.replace("path:", "paths:"))
