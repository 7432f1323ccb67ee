"""Adapters in PEFT's format: ``adapter_model.safetensors`` and ``adapter_config.json``.

A tensor is called ``base_model.model.transformer.h.0.attn.c_attn.lora_A.weight``, (R, C), and
``...lora_B.weight``, (F, R). ``base_model_name_or_path`` names the weights that the adapters belong
to, a release or a path. We add the sha256 of those weights to the metadata of the tensors' file,
which PEFT ignores, and compare it with the weights found. Follows the format of PEFT 0.21.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fastgpt2 import runs
from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.files import write_text
from fastgpt2.lora import (
    LoRASettings,
    adapters,
    add_lora,
    merge_weights,
    set_settings,
    settings_of,
)
from fastgpt2.weights.checkpoint import WTE, Checkpoint, listed
from fastgpt2.weights.digest import weights_sha256
from fastgpt2.weights.metadata import read_json, require, shown
from fastgpt2.weights.safetensors_file import read_safetensors, write_safetensors
from fastgpt2.weights.tensors import LazyTensor

_WPE = "transformer.wpe.weight"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_SHA256 = "base_sha256"
# options of PEFT that change what an adapter computes, and the values that do not
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
}
# the folders being opened: weights may have adapters themselves
_BELOW: ContextVar[tuple[Path, ...]] = ContextVar("below", default=())
# whether the adapted weights must not be downloaded
_OFFLINE: ContextVar[bool] = ContextVar("offline", default=False)


@dataclass(frozen=True)
class Adapter:
    """Adapters in a folder.

    Attributes:
        settings: arguments of ``add_lora``.
        pairs: A and B by the name of the layer.
        folder: their folder, for messages.
    """

    settings: LoRASettings
    pairs: Mapping[str, tuple[LazyTensor, LazyTensor]]
    folder: Path


def save_adapter(model: torch.nn.Module, folder: str | Path) -> None:
    """Write a GPT's adapters into a folder that PEFT and ``load_adapter`` can read.

    Args:
        model: a GPT after ``add_lora``.
        folder: created if it does not exist.

    Raises:
        UserError: the model has no adapters.
        OSError: the folder cannot be written.
    """
    settings = settings_of(model)
    if settings is None:
        raise UserError("save_adapter: the model has no adapters")
    write_adapter(settings, adapter_weights(model), Path(folder))


def adapter_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """The matrices of a GPT's adapters under PEFT's names; they share the model's memory.

    Args:
        model: a GPT after ``add_lora``.
    """
    tensors = {}
    for name, layer in adapters(model).items():
        tensors[_PREFIX + name + _A] = layer.lora_A.detach()
        tensors[_PREFIX + name + _B] = layer.lora_B.detach()
    return tensors


def write_adapter(settings: LoRASettings, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write PEFT's two files.

    Args:
        settings: the model's.
        weights: what ``adapter_weights`` returns.
        folder: created if it does not exist.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: LazyTensor.of(weight) for name, weight in weights.items()}
    metadata = {"format": "pt"}
    if settings.base_sha256 is not None:
        metadata[_SHA256] = settings.base_sha256
    write_safetensors(folder / runs.ADAPTER, tensors, metadata)
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": settings.base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": list(settings.targets),
        "lora_dropout": settings.dropout,
        "bias": "none",
        # Hugging Face's class stores matrices as (C, F)
        "fan_in_fan_out": True,
        "inference_mode": True,
    }
    write_text(folder / runs.ADAPTER_CONFIG, json.dumps(record, indent=2) + "\n")


def load_adapter(model: torch.nn.Module, folder: str | Path) -> None:
    """Add the adapters in a folder to a plain GPT, in place; from then on only these are trained.

    Args:
        model: a GPT with the weights that the adapters belong to.
        folder: holds PEFT's two files.

    Raises:
        UserError: a file is missing or damaged, the adapters do not fit, or their kind is not
            supported.
    """
    adapter = read_adapter(Path(folder))
    settings = adapter.settings
    add_lora(
        model,
        rank=settings.rank,
        alpha=settings.alpha,
        # each layer by its full name: PEFT accepts other ways to name them
        targets=tuple(adapter.pairs),
        dropout=settings.dropout,
        base=settings.base,
        base_sha256=settings.base_sha256,
    )
    layers = adapters(model)
    for name in adapter.pairs:
        _check_fits(adapter, name, tuple(layers[name].weight.shape))
    with torch.no_grad():
        for name, (a, b) in adapter.pairs.items():
            layers[name].lora_A.copy_(a.read())
            layers[name].lora_B.copy_(b.read())
    set_settings(model, settings)


def read_adapter(folder: Path) -> Adapter:
    """Open the adapters in a folder; their values are not read yet.

    Raises:
        UserError: as ``load_adapter``.
    """
    path = folder / runs.ADAPTER_CONFIG
    record = read_json(path)
    if record.get("peft_type") != "LORA":
        raise UserError(f"{path}: only LoRA is known, got {shown(record.get('peft_type'))}")
    for option, plain in _PLAIN.items():
        if record.get(option) not in plain:
            raise UserError(f"{path}: {option} = {shown(record[option])} is not supported")
    rank, alpha = require(record, "r", path), require(record, "lora_alpha", path)
    dropout, base = record.get("lora_dropout") or 0.0, record.get("base_model_name_or_path")
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (alpha, dropout))
    if not isinstance(rank, int) or rank < 1 or not numbers or not isinstance(base, str | None):
        raise UserError(f"{path}: r, lora_alpha, lora_dropout or the base is not of its type")
    if record.get("use_rslora"):
        # PEFT's other scale, alpha / sqrt(R)
        alpha = alpha * math.sqrt(rank)
    file = folder / runs.ADAPTER
    tensors, pairs = read_safetensors(file), {}
    for name in list(tensors):
        if name.startswith(_PREFIX) and name.endswith(_A) and name.removesuffix(_A) + _B in tensors:
            stem = name.removesuffix(_A)
            a, b = tensors.pop(name), tensors.pop(stem + _B)
            if len(a.shape) != 2 or a.shape[0] != rank or b.shape[1:] != (rank,):
                raise UserError(
                    f"{file}: {shown(stem)} has A {a.shape} and B {b.shape}, the rank is {rank}"
                )
            pairs[stem.removeprefix(_PREFIX)] = a, b
    if tensors or not pairs:
        raise UserError(f"{file}: unexpected {listed(list(tensors)) or 'end: no adapter in it'}")
    with safe_open(str(file), "pt") as opened:
        sha256 = (opened.metadata() or {}).get(_SHA256)
    targets = tuple(_targets(record, pairs))
    settings = LoRASettings(rank, float(alpha), targets, float(dropout), base, sha256)
    return Adapter(settings, pairs, folder)


def _targets(record: dict[str, Any], pairs: Mapping[str, Any]) -> list[str]:
    """The targets as they were given, if that was a list of names; else all layers' names."""
    given = record.get("target_modules")
    listed_ = isinstance(given, list) and all(isinstance(name, str) for name in given)
    return given if listed_ and given is not None else list(pairs)


def open_base(adapter: Adapter, config: GPTConfig | None = None) -> Checkpoint:
    """The weights that the adapters belong to.

    Args:
        adapter: what ``read_adapter`` returned.
        config: the model's, if known: its context and its vocabulary may be shorter than those of
            the weights.

    Raises:
        UserError: the weights do not exist, or their sha256 is not the recorded one.
    """
    # these modules import this one
    from fastgpt2.weights.formats import load
    from fastgpt2.weights.hub import locate

    where, settings = adapter.folder / runs.ADAPTER_CONFIG, adapter.settings
    if settings.base is None:
        raise UserError(f"{where}: base_model_name_or_path does not say which weights it adapts")
    folder, below = adapter.folder.resolve(), _BELOW.get()
    if folder in below:
        raise UserError(f"{where}: its weights are adapters of themselves")
    token = _BELOW.set((*below, folder))
    try:
        path = locate(settings.base, offline=_OFFLINE.get())
        base = load(path)
        found = None if settings.base_sha256 is None else weights_sha256(base)
    except UserError as error:
        raise UserError(f"{where}: the weights that it adapts: {error}") from None
    finally:
        _BELOW.reset(token)
    if found != settings.base_sha256:
        raise UserError(f"{where}: the weights in {settings.base} are not those that it adapts")
    if config is None:
        return base
    tensors = dict(base.tensors)
    for name, rows in ((WTE, config.vocab_size), (_WPE, config.block_size)):
        if tensors[name].shape[0] > rows:
            tensors[name] = tensors[name].rows(rows)
    return replace(base, config=config, tensors=tensors, quantization=None)


@contextmanager
def bases_offline(offline: bool) -> Iterator[None]:
    """Within the block, ``offline`` forbids downloading the weights that adapters belong to.

    Args:
        offline: False changes nothing.
    """
    token = _OFFLINE.set(offline or _OFFLINE.get())
    try:
        yield
    finally:
        _OFFLINE.reset(token)


def read(folder: Path, config: GPTConfig | None = None) -> Checkpoint:
    """The model of an adapter folder: its weights with the adapters merged in.

    Args:
        folder: holds PEFT's two files.
        config: the model's, if known.

    Raises:
        UserError: as ``load_adapter`` and ``open_base``.
    """
    adapter = read_adapter(folder)
    base = open_base(adapter, config)
    tensors = dict(base.tensors)
    for name, (a, b) in adapter.pairs.items():
        key = f"{name}.weight"
        _check_fits(adapter, name, tensors[key].shape if key in tensors else None)
        tensors[key] = _merged(tensors[key], a, b, adapter.settings)
    note = f"{len(adapter.pairs)} adapters of {folder} were added to the weights of {base.source}"
    notes = (*base.notes, note)
    files = (folder / runs.ADAPTER,)
    return Checkpoint(base.config, tensors, folder, notes=notes, files=files)


def _merged(weight: LazyTensor, a: LazyTensor, b: LazyTensor, settings: LoRASettings) -> LazyTensor:
    def read() -> Tensor:
        return merge_weights(weight.read(), a.read(), b.read(), settings.alpha / settings.rank)

    return LazyTensor(weight.shape, torch.float32, read)


def _check_fits(adapter: Adapter, name: str, has: tuple[int, ...] | None) -> None:
    """Raise ``UserError`` unless the adapter of a layer belongs to a weight of shape ``has``."""
    a, b = adapter.pairs[name]
    wants, file = (b.shape[0], a.shape[1]), adapter.folder / runs.ADAPTER
    if has is None:
        raise UserError(f"{file}: the model has no layer {shown(name)}")
    if has != wants:
        raise UserError(f"{file}: {shown(name)} is for a weight of {wants}, the model has {has}")
