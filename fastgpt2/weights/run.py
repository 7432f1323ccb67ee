"""Our own folders as a format: a checkpoint, or the best one of a run.

``fastgpt2.runs`` says what lies where.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

from fastgpt2 import runs
from fastgpt2.config import GPTConfig, unknown_key
from fastgpt2.files import write_text
from fastgpt2.weights.checkpoint import Checkpoint
from fastgpt2.weights.metadata import make_config, read_json
from fastgpt2.weights.safetensors_file import read_safetensors, write_safetensors


def read(folder: Path) -> Checkpoint:
    """Open a checkpoint folder, or the best one of a run."""
    if (folder / runs.CHECKPOINTS).is_dir():
        folder = runs.best(folder)
    path = folder / runs.MODEL_CONFIG
    record = read_json(path)
    known = [field.name for field in fields(GPTConfig)]
    for key in record:
        if key not in known:
            raise unknown_key(key, known, str(path))
    return Checkpoint(make_config(path, **record), read_safetensors(folder / runs.MODEL), folder)


def write(checkpoint: Checkpoint, run: Path) -> None:
    """Write a run folder whose one checkpoint, of step 0, has no training state."""
    folder = runs.step_folder(run, 0)
    folder.mkdir(parents=True)
    write_safetensors(folder / runs.MODEL, checkpoint.tensors, {"format": "pt"})
    write_text(folder / runs.MODEL_CONFIG, json.dumps(asdict(checkpoint.config), indent=2) + "\n")
    write_text(folder / runs.STATE, json.dumps({"step": 0}) + "\n")
