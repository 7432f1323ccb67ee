"""The formats by name: detect, read and write any of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastgpt2 import runs
from fastgpt2.config import GELUS, GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.files import atomic_folder
from fastgpt2.quantize import KINDS
from fastgpt2.weights import adapter, huggingface, llmc, nanogpt, openai, run
from fastgpt2.weights.checkpoint import HEAD, STORED_DTYPES, Checkpoint
from fastgpt2.weights.metadata import file_size
from fastgpt2.weights.tensors import LazyTensor


@dataclass(frozen=True)
class Format:
    """A format: reader, writer, dtypes and GELUs it can store, and its name if it is one file."""

    read: Callable[[Path], Checkpoint]
    write: Callable[[Checkpoint, Path], None]
    dtypes: tuple[torch.dtype, ...] = STORED_DTYPES
    file: str | None = None
    gelus: tuple[str, ...] = GELUS


FORMATS = {
    "hf": Format(huggingface.read, huggingface.write),
    "nanogpt": Format(nanogpt.read, nanogpt.write, file="ckpt.pt"),
    "llmc": Format(llmc.read, llmc.write, (torch.float32, torch.bfloat16), "model.bin", ("tanh",)),
    "openai": Format(openai.read, openai.write, (torch.float32,), gelus=("tanh",)),
    "fastgpt2": Format(run.read, run.write),
}
# of a quantized embedding
_SCALES = "transformer.wte.scales"
# names by which ``detect`` knows a folder
_MARKS = {runs.CHECKPOINTS, "hparams.json", "config.json", "ckpt.pt", "model.bin"}
# read only: PEFT's adapters, merged into the weights that they name
_PEFT = "peft"
_READERS = {name: format.read for name, format in FORMATS.items()} | {_PEFT: adapter.read}


def detect(path: Path) -> tuple[str, Path]:
    """Name of the format of ``path``, and the folder or file its reader takes.

    Raises:
        UserError: the path does not exist or has no known format.
    """
    try:
        if path.is_file():
            return _detect_file(path)
        if not path.is_dir():
            what = "is a device, a pipe or a socket" if path.exists() else "no such file or folder"
            raise UserError(f"{path}: {what}")
        names = {entry.name for entry in path.iterdir()}
        if runs.MODEL_CONFIG in names or runs.CHECKPOINTS in names:
            return "fastgpt2", path
        if "hparams.json" in names:
            return "openai", path
        if runs.ADAPTER_CONFIG in names:
            return _PEFT, path
        if "config.json" in names:
            return "hf", path
        for format in FORMATS.values():
            if format.file in names:
                return _detect_file(path / format.file)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}") from None
    raise UserError(
        f"{path}: no model found; expected one of {runs.MODEL_CONFIG}, {runs.CHECKPOINTS}/, "
        f"hparams.json, {runs.ADAPTER_CONFIG}, config.json, ckpt.pt, model.bin"
    )


def _detect_file(path: Path) -> tuple[str, Path]:
    file_size(path)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == llmc.MAGIC.to_bytes(4, "little"):
        return "llmc", path
    if path.name in (*huggingface.WEIGHTS, runs.MODEL, runs.ADAPTER):
        # the file with the shape of the model is beside it
        return detect(path.parent)
    if path.suffix in (".pt", ".pth"):
        return "nanogpt", path
    raise UserError(f"{path}: neither a ckpt.pt of nanoGPT nor a .bin of llm.c")


def load(path: str | Path, *, offline: bool = False) -> Checkpoint:
    """Open a model in any known format; no weights are read yet.

    Args:
        path: a folder (Hugging Face, OpenAI, our run or checkpoint, PEFT's adapters, which are
            merged into their weights) or a file (nanoGPT's ``ckpt.pt``, llm.c's ``.bin``).
        offline: do not use the network, which adapters of a release would need.

    Raises:
        UserError: no model, or a damaged one; the message names file and tensor.
    """
    format, path = detect(Path(path))
    with adapter.bases_offline(offline):
        return _READERS[format](path)


def save_model(
    config: GPTConfig, state_dict: Mapping[str, Tensor], path: str | Path, format: str
) -> Path:
    """Write a model in memory, as ``save`` writes a checkpoint; a quantized one as such, if it can.

    Args:
        config: the model's.
        state_dict: its tensors by their canonical names.
        path: a folder, or for ``nanogpt`` and ``llmc`` a file.
        format: one of ``FORMATS``.

    Raises:
        UserError: as ``save``, or an unknown format.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    head = HEAD.removesuffix("weight")
    tensors = {
        name: LazyTensor.of(x.detach())
        for name, x in state_dict.items()
        if not name.startswith(head)
    }
    if _SCALES in state_dict:
        # a state dict has the weights without their padding
        tensors[_SCALES] = LazyTensor.of(state_dict[_SCALES][: config.vocab_size])
    quantization = run.dequantize(tensors, Path(path))
    checkpoint = Checkpoint(config, tensors, Path(path), quantization=quantization)
    return save(checkpoint, path, format)


def save(
    checkpoint: Checkpoint,
    path: str | Path,
    format: str,
    *,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    beside: Callable[[Path], None] | None = None,
) -> Path:
    """Write ``checkpoint`` as ``format``; it appears under ``path`` whole or not at all.

    Args:
        checkpoint: what ``load`` returned.
        path: a folder that does not exist yet or is empty; for ``nanogpt`` and ``llmc`` also the
            file itself, with the ending ``.pt`` or ``.bin``.
        format: ``hf``, ``nanogpt``, ``llmc``, ``openai`` or ``fastgpt2``.
        dtype: round the weights to this; by default they keep their dtype, or widen to float32 if
            the format does not have it.
        quantize: ``int8``: store the matrices in 8 bits, only in ``fastgpt2``. A quantized
            checkpoint stays quantized in ``fastgpt2``; other formats get the dequantized weights.
        beside: called with the folder, to write more files into it.

    Returns:
        The folder or file written.

    Raises:
        UserError: the path is taken or cannot be written, or the format does not hold ``dtype`` or
            the model's GELU.
    """
    path, target = Path(path), FORMATS[format]
    if checkpoint.config.gelu not in target.gelus:
        raise UserError(
            f"format {format} means the {target.gelus[0]} GELU, and {checkpoint.source} has the "
            f"{checkpoint.config.gelu} GELU: logits would change (formats hf, nanogpt and fastgpt2 "
            f"keep it; convert --gelu {target.gelus[0]} forces it)"
        )
    if dtype is not None and dtype not in target.dtypes:
        known = ", ".join(str(known).removeprefix("torch.") for known in target.dtypes)
        raise UserError(f"format {format} holds {known}, not {str(dtype).removeprefix('torch.')}")
    if quantize is not None and (quantize not in KINDS or format != "fastgpt2"):
        raise UserError(
            f"only the format fastgpt2 can be quantized, as {', '.join(KINDS)}; "
            f"got {quantize} for {format}"
        )
    if dtype is not None:
        # a requested dtype applies to the matrices too
        checkpoint = replace(checkpoint.to(dtype), quantization=None)
    if quantize is not None:
        checkpoint = replace(checkpoint, quantization=quantize)
    try:
        if target.file is not None and path.suffix == Path(target.file).suffix:
            if path.exists():
                raise UserError(f"{path}: exists already")
            target.write(checkpoint, path)
            return path
        with atomic_folder(path, last=_MARKS) as folder:
            target.write(checkpoint, folder if target.file is None else folder / target.file)
            if beside is not None:
                beside(folder)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    return path if target.file is None else path / target.file
