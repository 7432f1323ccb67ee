"""Our own folders: a checkpoint of the training loop, or a whole run, of which the newest counts.

RUN/checkpoints/step_00001000/model.safetensors    weights by their canonical names
                              gpt_config.json      fields of GPTConfig
"""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path

from fastgpt2.config import GPTConfig, unknown_key
from fastgpt2.errors import UserError
from fastgpt2.files import write_text
from fastgpt2.weights.checkpoint import Checkpoint
from fastgpt2.weights.metadata import make_config, read_json
from fastgpt2.weights.safetensors_file import read_safetensors, write_safetensors

CONFIG, WEIGHTS, CHECKPOINTS = "gpt_config.json", "model.safetensors", "checkpoints"
STEP = re.compile(r"step_\d+")


def newest(run: Path) -> Path:
    """The folder of the newest checkpoint of a run."""
    steps = [path for path in (run / CHECKPOINTS).iterdir() if STEP.fullmatch(path.name)]
    if not steps:
        raise UserError(f"{run}: has no checkpoint yet")
    return max(steps, key=lambda path: int(path.name.removeprefix("step_")))


def read(folder: Path) -> Checkpoint:
    """Open a checkpoint folder, or the newest one of a run."""
    if (folder / CHECKPOINTS).is_dir():
        folder = newest(folder)
    path = folder / CONFIG
    record = read_json(path)
    known = [field.name for field in fields(GPTConfig)]
    for key in record:
        if key not in known:
            raise unknown_key(key, known, str(path))
    return Checkpoint(make_config(path, **record), read_safetensors(folder / WEIGHTS), folder)


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint folder, without the state of a training."""
    write_safetensors(folder / WEIGHTS, checkpoint.tensors, {"format": "pt"})
    write_text(folder / CONFIG, json.dumps(asdict(checkpoint.config), indent=2) + "\n")
