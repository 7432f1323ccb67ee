"""Checkpoints: safetensors and JSON in a folder that appears whole or not at all.

``RUN/checkpoints/step_00000250/`` holds ``model.safetensors`` (fp32, true vocabulary, the tied head
once), ``gpt_config.json``, ``optimizer.safetensors`` (AdamW's moments, random-number states) and
``state.json`` (step, data position, losses, loss scale, tokenizer). It is written under another
name, put on the disk, and renamed.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.files import sync, write_text
from fastgpt2.model import GPT

MODEL, OPTIMIZER, STATE, CONFIG = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "gpt_config.json",
)
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(
    run: Path, step: int, model: GPT, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write the checkpoint of ``step``; ``state`` is plain JSON. Returns its folder."""
    final = _folder(run, step)
    if final.exists():
        return final
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    save_file(weights, temporary / MODEL, metadata={"format": "pt"})
    save_file(_optimizer_tensors(model, optimizer) | _rng_tensors(), temporary / OPTIMIZER)
    for path in (temporary / MODEL, temporary / OPTIMIZER):
        sync(path)
    write_text(temporary / CONFIG, json.dumps(asdict(model.config), indent=2) + "\n")
    write_text(temporary / STATE, json.dumps({"step": step, **state}, indent=2) + "\n")
    os.rename(temporary, final)
    sync(final.parent)
    return final


def saved_steps(run: Path) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    folders = (run / "checkpoints").glob("step_*")
    return sorted(int(f.name.removeprefix("step_")) for f in folders if (f / STATE).is_file())


def latest(run: Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        UserError: the run has none.
    """
    steps = saved_steps(run)
    if not steps:
        raise UserError(f"{run}: no checkpoint in it (a run folder of fastgpt2.train is expected)")
    return _folder(run, steps[-1])


def best(run: Path) -> Path:
    """The checkpoint with the lowest validation loss; the newest where none was measured."""
    steps = saved_steps(run)
    losses = {step: read_state(_folder(run, step)).get("val_loss") for step in steps}
    measured = {step: loss for step, loss in losses.items() if loss is not None}
    return _folder(run, min(measured, key=measured.__getitem__)) if measured else latest(run)


def prune(run: Path, keep_last: int) -> None:
    """Delete all checkpoints but the best and the newest ``keep_last``."""
    keep = {_folder(run, step) for step in saved_steps(run)[-keep_last:]} | {best(run)}
    for step in saved_steps(run):
        if _folder(run, step) not in keep:
            shutil.rmtree(_folder(run, step))


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / STATE}: cannot be read: {error}") from None
    if not isinstance(state, dict):
        raise UserError(f"{folder / STATE}: expected a JSON object")
    return state


def load_model(folder: Path, **overrides: Any) -> GPT:
    """The model of a checkpoint, with fields of its configuration such as ``impl`` replaced.

    Raises:
        UserError: a file is missing, damaged, or does not fit the configuration.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        model = GPT(GPTConfig(**(config | overrides)))
        model.load_state_dict(load_file(folder / MODEL))
    except UserError:
        raise
    except Exception as error:
        # safetensors and PyTorch raise types of their own for damaged and misshaped files
        raise UserError(f"{folder}: cannot be loaded: {error}") from None
    return model


def load_training_state(folder: Path, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Put AdamW's moments and the random-number states back as they were."""
    try:
        tensors = load_file(folder / OPTIMIZER)
    except Exception as error:
        raise UserError(f"{folder / OPTIMIZER}: cannot be loaded: {error}") from None
    for name, parameter in model.named_parameters():
        if f"step.{name}" not in tensors:
            continue
        state: dict[str, Tensor] = {"step": tensors[f"step.{name}"]}
        if optimizer.defaults["fused"]:
            state["step"] = state["step"].to(parameter.device)
        for moment in _MOMENTS:
            state[moment] = torch.zeros_like(parameter)
            saved = tensors[f"{moment}.{name}"]
            state[moment][: saved.shape[0]] = saved
        optimizer.state[parameter] = state
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def _optimizer_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        if not state:
            continue
        rows = model.config.vocab_size if name == "transformer.wte.weight" else parameter.shape[0]
        tensors[f"step.{name}"] = state["step"].cpu()
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = state[moment][:rows]
    return tensors


def _rng_tensors() -> dict[str, Tensor]:
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors
