"""``python -m fastgpt2.convert``: a model from any format into any other, bit for bit."""

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastgpt2 import streams
from fastgpt2.cli import Parser, file_name, file_path, run
from fastgpt2.config import GELUS
from fastgpt2.errors import UserError
from fastgpt2.files import write_text
from fastgpt2.quantize import KINDS
from fastgpt2.runs import find_tokenizer
from fastgpt2.text import GPT2Tokenizer, save_tokenizer
from fastgpt2.weights import FORMATS, RELEASES, Checkpoint, huggingface, load, nanogpt, save
from fastgpt2.weights.formats import detect
from fastgpt2.weights.hub import locate
from fastgpt2.weights.metadata import read_json

ROUNDED_TO = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HF_TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
HF_CONFIG = "config.json"
# our (OpenAI's) names of the vocabulary files -> Hugging Face's
HF_NAMES = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="fastgpt2 convert",
        description="Convert a GPT-2 between formats; the format of SRC is detected.",
    )
    parser.add_argument(
        "src",
        metavar="SRC",
        type=file_name,
        help=f"run folder, a folder or file, or one of {', '.join(RELEASES)}",
    )
    parser.add_argument(
        "dst", metavar="DST", type=file_path, help="new folder, .pt file or .bin file"
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="format of DST")
    parser.add_argument(
        "--dtype", choices=ROUNDED_TO, help="round the weights to this dtype [unchanged]"
    )
    parser.add_argument(
        "--quantize",
        choices=KINDS,
        help="round the weights to 8 bits, one scale per row; only with --to fastgpt2",
    )
    parser.add_argument(
        "--gelu",
        choices=GELUS,
        help="take the model for one with this GELU, which changes its logits by about 1e-3 [the "
        "one that SRC says; nanoGPT's files say nothing: erf]",
    )
    parser.add_argument("--offline", action="store_true", help="do not use the network")
    return parser


def convert(
    src: str,
    dst: Path,
    to: str,
    *,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    gelu: str | None = None,
    offline: bool = False,
) -> list[str]:
    """Convert ``src``; returns lines that say what was done. See the command's help."""
    path = locate(src, offline=offline)
    checkpoint = load(path, offline=offline)
    if gelu is not None:
        checkpoint = replace(checkpoint, config=replace(checkpoint.config, gelu=gelu))
    folder = path if path.is_dir() else path.parent
    notes = list(checkpoint.notes)
    form = checkpoint.config.gelu
    if to == "nanogpt" and form != nanogpt.EXACT:
        notes.append(
            f"the model has the {form} GELU, nanoGPT computes the {nanogpt.EXACT} GELU: its logits "
            "differ by about 1e-3"
        )

    def beside(target: Path) -> None:
        if to == "hf" and detect(path)[0] == "hf":
            _carry_config(folder, target, () if gelu is None else (huggingface.ACTIVATION,))
        notes.extend(_carry_tokenizer(folder, target, to))

    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    with tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc=str(dst),
        leave=False,
        delay=streams.BAR_DELAY,
    ) as bar:
        written = save(
            _counted(checkpoint, bar.update),
            dst,
            to,
            dtype=dtype,
            quantize=quantize,
            beside=beside,
        )
    count = sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    return [*notes, f"{checkpoint.source} -> {written} ({to}, {count:,} parameters)"]


def _counted(checkpoint: Checkpoint, update: Callable[[int], object]) -> Checkpoint:
    """The same checkpoint; it calls ``update`` with the bytes of each tensor that is read."""

    def read(name: str) -> Tensor:
        tensor = checkpoint.tensors[name]
        update(tensor.nbytes)
        return tensor.read()

    tensors = {
        name: replace(tensor, read=partial(read, name))
        for name, tensor in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def _carry_config(source: Path, target: Path, forced: Sequence[str]) -> None:
    """Between Hugging Face folders, keep every option that does not depend on the weights.

    Token ids, task parameters and unknown options stay; only dtype, class and what is ``forced``
    come from the new weights.
    """
    written = read_json(target / HF_CONFIG)
    kept = {key: v for key, v in read_json(source / HF_CONFIG).items() if key != "dtype"}
    decided = {key: written[key] for key in ("architectures", "torch_dtype", *forced)}
    record = kept | decided
    write_text(target / HF_CONFIG, json.dumps(record, indent=2, sort_keys=True) + "\n")


def _carry_tokenizer(source: Path, target: Path, to: str) -> list[str]:
    """Write the tokenizer of ``source`` beside the weights, with the format's file names."""
    if FORMATS[to].file is not None:
        # nanoGPT and llm.c have their own copy of GPT-2's vocabulary
        return []
    present = [name for name in HF_TOKENIZER_FILES if (source / name).is_file()]
    if to == "hf" and present:
        for name in present:
            shutil.copyfile(source / name, target / name)
        return []
    try:
        tokenizer = find_tokenizer(source)
    except UserError as error:
        return [f"no tokenizer written: {error}"]
    except OSError as error:
        # the caller takes others for errors of the target
        raise UserError(f"{error.filename or source}: cannot be read: {error.strerror}") from None
    if tokenizer is None:
        return [f"no tokenizer written: {source} has none"]
    if to == "fastgpt2":
        save_tokenizer(tokenizer, target)
    elif not isinstance(tokenizer, GPT2Tokenizer):
        return [f"no tokenizer written: format {to} has no tokenizer {tokenizer.name!r}"]
    else:
        tokenizer.save_vocabulary(target)
    if to == "hf":
        for name, theirs in HF_NAMES.items():
            (target / name).rename(target / theirs)
        write_text(
            target / "tokenizer_config.json", json.dumps({"tokenizer_class": "GPT2Tokenizer"})
        )
    return []


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = build_parser().parse_args(argv)

    def body() -> None:
        dtype = None if args.dtype is None else ROUNDED_TO[args.dtype]
        lines = convert(
            args.src,
            args.dst,
            args.to,
            dtype=dtype,
            quantize=args.quantize,
            gelu=args.gelu,
            offline=args.offline,
        )
        for line in lines:
            print(line)

    return run("convert", body, steady=True)


if __name__ == "__main__":
    raise SystemExit(main())
