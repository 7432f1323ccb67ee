"""Checkpoints: safetensors and JSON in a folder that appears whole or not at all.

All is copied first, so that a thread can write while training goes on.
``RUN/checkpoints/step_00000250/`` holds ``model.safetensors`` (fp32, true vocabulary, the tied head
once; PEFT's two files where the run trains adapters), ``gpt_config.json``,
``optimizer.safetensors`` (moments, random-number states) and ``state.json`` (step, data position,
losses, loss scale, tokenizer). Of a sharded run ``shards/`` is in the place of the two safetensors
files: the parts of each process. It is written under another name, put on the disk, and renamed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fastgpt2 import distributed, runs
from fastgpt2.config import GPTConfig
from fastgpt2.devices import device_kind, host_copies, rng_states, set_rng_states
from fastgpt2.errors import UserError
from fastgpt2.files import sha256_of, sync, write_text
from fastgpt2.lora import LoRASettings
from fastgpt2.model import GPT
from fastgpt2.train.parallel import placed_like, reshard, whole_weights
from fastgpt2.train.shards import staged_shards
from fastgpt2.weights.adapter import (
    adapter_weights,
    load_adapter,
    open_base,
    read_adapter,
    write_adapter,
)
from fastgpt2.weights.safetensors_file import write_safetensors
from fastgpt2.weights.shards import WEIGHTS, read_shards
from fastgpt2.weights.tensors import LazyTensor

# writes tensors into a folder; returns the digests of files, by name, that it knows
WriteTensors = Callable[[Path], dict[str, str]]
# AdamW's two, and Muon's
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def save(
    run: Path, step: int, model: GPT, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write the checkpoint of ``step``; ``state`` is plain JSON. Returns its folder.

    If the step has a checkpoint already, only its ``state`` is rewritten. All processes call this;
    the first one writes, or of a sharded model each its part.

    Raises:
        UserError: it cannot be written.
    """
    distributed.together(staged(run, step, model, optimizer, state))
    return runs.step_folder(run, step)


def staged(
    run: Path, step: int, model: GPT, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Callable[[], None]:
    """Copy all that the checkpoint of ``step`` holds; training may go on at once.

    All processes call it. What it returns writes the checkpoint as ``save`` does: each process
    calls that once, in any thread, and one after the other where there are several checkpoints.
    """
    final = runs.step_folder(run, step)
    record = {"format": runs.FORMAT, "step": step, **state}
    writes = distributed.rank() == 0
    if distributed.on_rank_0(lambda: _has_begun(final)):
        # the other files stay as they are, and so do their digests
        return (lambda: _write_state_anew(final, record)) if writes else lambda: None
    # the optimizer knows the shards alone
    reshard(model)
    tensors = _training_tensors(model, optimizer)
    if isinstance(model, FSDPModule):
        parts = {WEIGHTS + name: weight for name, weight in model.named_parameters()}
        on_cuda = device_kind(model.lm_head.weight.device).cuda
        write_shards = staged_shards(parts | tensors, on_cuda=on_cuda)
        return lambda: _write(final, model.config, write_shards, record)
    if not writes:
        return lambda: None
    # a model with adapters saves only these
    weights = whole_weights(model) if model.lora is None else adapter_weights(model)
    write_files = _writer(model.lora, host_copies(weights), host_copies(tensors))
    return lambda: _write(final, model.config, write_files, record)


def _has_begun(final: Path) -> bool:
    """Whether the checkpoint is there already; if not, an empty folder of another name is."""
    if final.exists():
        return True
    try:
        shutil.rmtree(_hidden(final), ignore_errors=True)
        _hidden(final).mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{final}: cannot be written: {error}") from None
    return False


def _writer(
    lora: LoRASettings | None, weights: dict[str, Tensor], tensors: dict[str, Tensor]
) -> WriteTensors:
    """What writes whole tensors into a folder, and returns the digests of its files."""

    def write(folder: Path) -> dict[str, str]:
        if lora is not None:
            write_adapter(lora, weights, folder)
            return {runs.OPTIMIZER: _write_file(folder / runs.OPTIMIZER, tensors)}
        return {
            runs.MODEL: _write_file(folder / runs.MODEL, weights, {"format": "pt"}),
            runs.OPTIMIZER: _write_file(folder / runs.OPTIMIZER, tensors),
        }

    return write


def _write_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file; returns its digest."""
    digest = hashlib.sha256()
    lazy = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
    write_safetensors(path, lazy, metadata, also=digest.update)
    return digest.hexdigest()


def _write(
    final: Path, config: GPTConfig, write_tensors: WriteTensors, record: dict[str, Any]
) -> None:
    """Fill a folder of another name; once all processes have done that, it gets its own."""
    temporary = _hidden(final)
    try:
        digests = write_tensors(temporary)
        if distributed.rank():
            return
        write_text(temporary / runs.MODEL_CONFIG, json.dumps(asdict(config), indent=2) + "\n")
        record["sha256"] = {}
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            sync(path)
            name = path.relative_to(temporary).as_posix()
            record["sha256"][name] = digests.get(name) or sha256_of(path)
        write_text(temporary / runs.STATE, _json(record))
        os.rename(temporary, final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{final}: cannot be written: {error}") from None
    finally:
        if distributed.rank() == 0:
            # half a checkpoint would take the room that the next one needs
            shutil.rmtree(temporary, ignore_errors=True)


def _write_state_anew(final: Path, record: dict[str, Any]) -> None:
    try:
        record["sha256"] = runs.read_state(final).get("sha256", {})
        write_text(final / runs.STATE, _json(record))
    except OSError as error:
        raise UserError(f"{final}: cannot be written: {error}") from None


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2, allow_nan=False) + "\n"


def prune(run: Path, keep_last: int) -> None:
    """Delete all checkpoints but the best and the newest ``keep_last``, and a crash's leftovers."""
    steps, best = runs.saved_steps(run), runs.best(run, pass_over=True)
    _delete(run, [s for s in steps[:-keep_last] if runs.step_folder(run, s) != best])


def newest_before(run: Path, step: int) -> Path | None:
    """The newest checkpoint of fewer than ``step`` steps; those of more are deleted.

    Args:
        run: the run folder.
        step: number of a step that is to be undone, from 1.

    Returns:
        Its folder; None where there is none, and then nothing is deleted.
    """
    steps = runs.saved_steps(run)
    earlier = [saved for saved in steps if saved < step]
    if not earlier:
        return None
    _delete(run, [saved for saved in steps if saved >= step])
    return runs.step_folder(run, earlier[-1])


def _delete(run: Path, steps: Iterable[int]) -> None:
    """Delete the checkpoints of these steps, and a crash's leftovers."""
    for step in steps:
        # rename first: half a checkpoint must never have a checkpoint's name
        folder = runs.step_folder(run, step)
        shutil.rmtree(_hidden(folder), ignore_errors=True)
        os.rename(folder, _hidden(folder))
    for leftover in (run / "checkpoints").glob(".step_*"):
        shutil.rmtree(leftover)


def load_model(folder: Path, **overrides: Any) -> GPT:
    """The model of a checkpoint, with fields of its configuration such as ``impl`` replaced.

    Raises:
        UserError: a file is missing, damaged, or does not fit the configuration.
    """
    try:
        config = json.loads((folder / runs.MODEL_CONFIG).read_bytes())
        # skip an initialisation that would be overwritten at once
        with torch.device("meta"):
            model = GPT(GPTConfig(**(config | overrides)))
        if (folder / runs.ADAPTER).is_file():
            base = open_base(read_adapter(folder), model.config)
            model.load_state_dict(base.to(torch.float32).state_dict(), assign=True)
            load_adapter(model, folder)
            return model
        model.load_state_dict(_read_weights(folder, model.config), assign=True)
    except UserError:
        raise
    except Exception as error:
        # safetensors and PyTorch raise types of their own for damaged and misshaped files
        raise UserError(f"{folder}: cannot be loaded: {_beginning(error)}") from None
    return model


def _read_weights(folder: Path, config: GPTConfig) -> dict[str, Tensor]:
    if not (folder / runs.SHARDS).is_dir():
        # copies: the file's own memory map would be trained in, and keep the file from deletion
        return {name: tensor.clone() for name, tensor in load_file(folder / runs.MODEL).items()}
    found = read_shards(folder / runs.SHARDS, config.vocab_size).items()
    return {k.removeprefix(WEIGHTS): x.read() for k, x in found if k.startswith(WEIGHTS)}


def _read_training_tensors(folder: Path, config: GPTConfig) -> dict[str, Tensor]:
    if not (folder / runs.SHARDS).is_dir():
        return load_file(folder / runs.OPTIMIZER)
    found = read_shards(folder / runs.SHARDS, config.vocab_size).items()
    return {k: x.read() for k, x in found if not k.startswith(WEIGHTS)}


@torch.no_grad()
def load_weights(folder: Path, model: GPT) -> None:
    """Put the weights of a checkpoint into a model that has its shape, sharded or plain.

    Args:
        folder: the checkpoint.
        model: the model whose parameters are overwritten.

    Raises:
        UserError: a file is missing, damaged, or does not fit the model.
    """
    saved = dict(load_model(folder).named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_(placed_like(parameter, saved[name].to(parameter.device)))


def load_training_state(folder: Path, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimizer's moments and the random-number states.

    Raises:
        UserError: the file is missing, damaged, or does not fit the model.
    """
    try:
        tensors = _read_training_tensors(folder, model.config)
        for name, parameter in model.named_parameters():
            state: dict[str, Tensor] = {}
            if f"step.{name}" in tensors:
                state["step"] = tensors[f"step.{name}"].reshape(()).to(parameter.device)
            for moment in _MOMENTS:
                if f"{moment}.{name}" in tensors:
                    # moments of padded rows are not saved
                    full = torch.zeros(
                        parameter.shape, dtype=parameter.dtype, device=parameter.device
                    )
                    full[: _true_rows(model, name, parameter)] = tensors[f"{moment}.{name}"]
                    state[moment] = placed_like(parameter, full)
            # AdamW has all three of these or none; Muon has only its buffer
            if (adamw := {"step", "exp_avg", "exp_avg_sq"}) & set(state) and not adamw <= set(
                state
            ):
                raise KeyError(f"{(adamw - set(state)).pop()}.{name}")
            # a parameter that has never had a gradient has no moments
            if state:
                optimizer.state[parameter] = state
        _restore_random_numbers(tensors, model.lm_head.weight.device)
    except UserError:
        raise
    except Exception as error:
        # an error as above, or a missing tensor
        raise UserError(
            f"{folder / runs.OPTIMIZER}: cannot be loaded: {_beginning(error)}"
        ) from None


def _beginning(error: Exception) -> str:
    """The start of a message: PyTorch's messages go on to name every tensor that does not fit."""
    text = f"no tensor {error}" if isinstance(error, KeyError) else str(error)
    return shorten(text, 200, placeholder=" ...")


def _hidden(folder: Path) -> Path:
    """The path next to ``folder`` for what is not yet, or no longer, a checkpoint."""
    return folder.with_name(f".{folder.name}")


def _true_rows(model: GPT, name: str, parameter: Tensor) -> int:
    """Rows without the padding of the vocabulary."""
    return model.config.vocab_size if name == "transformer.wte.weight" else parameter.shape[0]


def _training_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments, in the optimizer's own memory, and states of random-number generators."""
    # each process has random numbers of its own
    every = distributed.gather([rng_states(model.lm_head.weight.device)])
    tensors = {
        f"rng.{name}{_of_rank(rank)}": state
        for rank, states in enumerate(every)
        for name, state in states.items()
    }
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        if not state:
            continue
        if "step" in state:
            tensors[f"step.{name}"] = state["step"].cpu()
        for moment in _MOMENTS:
            if moment in state:
                tensors[f"{moment}.{name}"] = state[moment]
                # no process has all rows of a shard
                if not isinstance(model, FSDPModule):
                    rows = _true_rows(model, name, parameter)
                    tensors[f"{moment}.{name}"] = state[moment][:rows]
    return tensors


def _restore_random_numbers(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Restore this process's generators; a process that did not exist at the save has its own."""
    ending = _of_rank(distributed.rank())
    saved = {name: tensors.get(f"rng.{name}{ending}") for name in rng_states(device)}
    states = {name: state for name, state in saved.items() if state is not None}
    if states or not ending:
        set_rng_states(states, device)


def _of_rank(rank: int) -> str:
    """The suffix of a process's names; the first process has none."""
    return f".{rank}" if rank else ""
