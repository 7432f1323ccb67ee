"""The run folder: what lies where in it, which checkpoint counts, and its tokenizer.

RUN/config.toml                        the resolved configuration
    fastgpt2_tokenizer.json            the tokenizer; GPT-2's vocabulary files if it is GPT-2's
    metrics.jsonl metrics.csv loss.png what was measured
    trace.json profile.txt tensorboard/ wandb/   where --profile and --log ask for them
    checkpoints/step_00001000/         model.safetensors    weights by their canonical names; with
                                                            LoRA the two files of PEFT instead
                                       gpt_config.json      fields of GPTConfig
                                       optimizer.safetensors
                                       shards/              of a sharded run, in the place of the
                                                            two safetensors files
                                       state.json           step, losses, data position, ...
"""

import math
import re
from pathlib import Path
from typing import Any

from fastgpt2.errors import UserError
from fastgpt2.files import parse_json
from fastgpt2.text.bpe import FILE_NAMES, GPT2Tokenizer
from fastgpt2.text.encoding import Tokenizer
from fastgpt2.text.tokenizers import FILE_NAME, load_tokenizer

RUN_CONFIG, CHECKPOINTS = "config.toml", "checkpoints"
MODEL, MODEL_CONFIG = "model.safetensors", "gpt_config.json"
# a run with LoRA has these files instead of the model's
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
# a sharded run has this folder instead of the model's and the optimizer's files
SHARDS = "shards"
# of state.json; raised where an older fastgpt2 could not read a checkpoint: 2 knows shards
FORMAT = 2
_STEP = re.compile(r"step_(\d{8,})")


class NewerFormatError(UserError):
    """A checkpoint is not damaged: a newer fastgpt2 has saved it."""


def is_run(folder: Path) -> bool:
    """Whether ``fastgpt2 train`` made the folder."""
    return (folder / RUN_CONFIG).is_file()


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is in ``run``, or would be."""
    return run / CHECKPOINTS / f"step_{step:08d}"


def saved_steps(run: Path) -> list[int]:
    """Steps of ``run`` that have a checkpoint, ascending."""
    folders = (run / CHECKPOINTS).glob("step_*")
    names = (_STEP.fullmatch(f.name) for f in folders if (f / STATE).is_file())
    return sorted(int(name[1]) for name in names if name)


def latest(run: Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        UserError: the run has none.
    """
    steps = saved_steps(run)
    if not steps:
        raise UserError(f"{run}: no checkpoint in it (a run folder of fastgpt2 train is expected)")
    return step_folder(run, steps[-1])


def best(run: Path, *, pass_over: bool = False) -> Path:
    """The checkpoint with the lowest validation loss; the newest where none was measured.

    Args:
        run: the run folder.
        pass_over: leave out the checkpoints whose state cannot be read.

    Raises:
        UserError: the run has none, or the state of one cannot be read.
    """
    losses = {}
    for step in saved_steps(run):
        folder = step_folder(run, step)
        try:
            validation = read_state(folder).get("validation")
        except UserError:
            # a run that trains may have deleted it meanwhile
            if folder.exists() and not pass_over:
                raise
            continue
        loss = validation.get("loss") if isinstance(validation, dict) else None
        if isinstance(loss, int | float) and -math.inf < loss < math.inf:
            losses[step] = loss
    return step_folder(run, min(losses, key=losses.__getitem__)) if losses else latest(run)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        UserError: it cannot be read, or it is not a JSON object.
        NewerFormatError: it is of a format that a newer fastgpt2 writes.
    """
    path = checkpoint / STATE
    try:
        state = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: expected a JSON object")
    if not isinstance(state.get("sha256", {}), dict):
        raise UserError(f"{path}: damaged: its sha256 is not a JSON object")
    # the first checkpoints said nothing
    saved = state.get("format", 0)
    if not isinstance(saved, int):
        raise UserError(f"{path}: damaged: its format is {saved!r}")
    if saved > FORMAT:
        raise NewerFormatError(
            f"{path}: saved in format {saved} by a newer fastgpt2; this one reads up to {FORMAT}"
        )
    return state


def find_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer beside a model: ours, or GPT-2's vocabulary under any of its names.

    Args:
        path: a run, one of its checkpoints, or a folder or file in any known format.

    Raises:
        UserError: there is one, and it is damaged.
    """
    folder = path if path.is_dir() else path.parent
    # a run keeps its tokenizer at the top, two folders above a checkpoint
    for place in (folder, *folder.absolute().parents[1:2]):
        if (place / FILE_NAME).is_file():
            return load_tokenizer(place)
    single = (folder / "tokenizer.json").is_file()
    if single or any(all((folder / f).is_file() for f in pair) for pair in FILE_NAMES):
        return GPT2Tokenizer.from_folder(folder)
    return None
