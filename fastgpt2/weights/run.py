"""Our own folders: a checkpoint of the training loop, or a whole run, of which the best counts.

RUN/checkpoints/step_00001000/model.safetensors    weights by their canonical names
                              gpt_config.json      fields of GPTConfig
                              state.json           step, validation loss, ...
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

from fastgpt2.config import GPTConfig, unknown_key
from fastgpt2.errors import UserError
from fastgpt2.files import write_text
from fastgpt2.weights.checkpoint import Checkpoint
from fastgpt2.weights.metadata import make_config, read_json
from fastgpt2.weights.safetensors_file import read_safetensors, write_safetensors

CHECKPOINTS = "checkpoints"
WEIGHTS, CONFIG, STATE = "model.safetensors", "gpt_config.json", "state.json"


def best(run: Path) -> Path:
    """The checkpoint with the lowest validation loss; the newest where none was measured."""
    steps = [path for path in (run / CHECKPOINTS).glob("step_*") if (path / STATE).is_file()]
    if not steps:
        raise UserError(f"{run}: has no checkpoint yet")
    losses = {path: _validation_loss(path) for path in sorted(steps)}
    measured = {path: loss for path, loss in losses.items() if isinstance(loss, int | float)}
    return min(measured, key=measured.__getitem__) if measured else max(steps)


def _validation_loss(path: Path) -> object:
    validation = read_json(path / STATE).get("validation")
    return validation.get("loss") if isinstance(validation, dict) else None


def read(folder: Path) -> Checkpoint:
    """Open a checkpoint folder, or the best one of a run."""
    if (folder / CHECKPOINTS).is_dir():
        folder = best(folder)
    path = folder / CONFIG
    record = read_json(path)
    known = [field.name for field in fields(GPTConfig)]
    for key in record:
        if key not in known:
            raise unknown_key(key, known, str(path))
    return Checkpoint(make_config(path, **record), read_safetensors(folder / WEIGHTS), folder)


def write(checkpoint: Checkpoint, run: Path) -> None:
    """Write a run folder whose one checkpoint, of step 0, has no training state."""
    folder = run / CHECKPOINTS / "step_00000000"
    folder.mkdir(parents=True)
    write_safetensors(folder / WEIGHTS, checkpoint.tensors, {"format": "pt"})
    write_text(folder / CONFIG, json.dumps(asdict(checkpoint.config), indent=2) + "\n")
    write_text(folder / STATE, json.dumps({"step": 0}) + "\n")
