"""nanoGPT's ``ckpt.pt``: a dictionary of state dict, model arguments and training state.

Keys and layout are the same as ours, with these differences: a compiled model's keys start with
``_orig_mod.``, old files have the causal mask as ``attn.bias``, and GPT-2's vocabulary is often
padded to 50304. nanoGPT computes the erf GELU, OpenAI's GPT-2 the tanh form. The file does not
record it: it is read as ``erf``, unless we wrote the file from a model with another form. nanoGPT
before June 2023 had the tanh form: override ``gelu`` for its files.
Format: ``train.py`` of https://github.com/karpathy/nanoGPT
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastgpt2.errors import UserError
from fastgpt2.files import atomic_path
from fastgpt2.weights.checkpoint import HEAD, WTE, Checkpoint, drop_tied_head
from fastgpt2.weights.metadata import make_config, require
from fastgpt2.weights.torch_file import lazy_tensors, read_torch, write_torch

FIELDS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")
# nanoGPT's training from scratch rounds GPT-2's 50257 up to this; the extra ids never occur
PADDED_VOCAB, VOCAB = 50304, 50257
# our key in the file's `config`, which nanoGPT ignores
GELU = "fastgpt2_gelu"
# nanoGPT's form of the GELU
EXACT = "erf"
MASK = re.compile(r"transformer\.h\.\d+\.attn\.bias")


def read(path: Path) -> Checkpoint:
    """Open a ``ckpt.pt``; a vocabulary padded to 50304 rows is cut to the true 50257."""
    content = read_torch(path)
    args, state = require(content, "model_args", path), require(content, "model", path)
    if not isinstance(args, dict) or not isinstance(state, dict):
        raise UserError(f"{path}: 'model_args' and 'model' must be dictionaries")
    # nanoGPT added `bias` and `dropout` later
    fields = {"bias": True, "dropout": 0.0} | {key: args[key] for key in FIELDS if key in args}
    for key in FIELDS:
        require(fields, key, path)
    training = content.get("config")
    gelu = training.get(GELU, EXACT) if isinstance(training, dict) else EXACT
    config = make_config(path, **fields, gelu=gelu)
    tensors = lazy_tensors(path, {str(k).removeprefix("_orig_mod."): v for k, v in state.items()})
    tensors = {name: tensor for name, tensor in tensors.items() if not MASK.fullmatch(name)}
    tensors = drop_tied_head(tensors, path)
    notes: tuple[str, ...] = ()
    wte = tensors.get(WTE)
    if config.vocab_size == PADDED_VOCAB and wte is not None and wte.shape[:1] == (PADDED_VOCAB,):
        config = replace(config, vocab_size=VOCAB)
        tensors[WTE] = wte.rows(VOCAB)
        notes = (f"cut the vocabulary from {PADDED_VOCAB} padded rows to GPT-2's {VOCAB}",)
    return Checkpoint(config, tensors, path, notes, files=(path,))


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write a ``ckpt.pt`` that nanoGPT's ``sample.py`` loads and ``train.py`` resumes, with a fresh
    optimizer."""
    config = checkpoint.config
    state = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    content = {
        # both names share one storage, as in the module
        "model": {**state, HEAD: state[WTE]},
        "model_args": {key: getattr(config, key) for key in FIELDS},
        "optimizer": _fresh_optimizer([tensor.dim() for tensor in state.values()]),
        "iter_num": 0,
        "best_val_loss": 1e9,
        "config": {} if config.gelu == EXACT else {GELU: config.gelu},
    }
    with atomic_path(path, new=True) as temporary, temporary.open("wb") as file:
        write_torch(content, file)


def _fresh_optimizer(dims: list[int]) -> dict[str, Any]:
    """State of nanoGPT's AdamW before its first step, with its default hyperparameters."""
    matrices = [torch.empty(0) for dim in dims if dim >= 2]
    vectors = [torch.empty(0) for dim in dims if dim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)).state_dict()
