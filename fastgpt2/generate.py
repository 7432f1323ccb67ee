"""``python -m fastgpt2.generate``: continue a text with a trained model."""

import argparse
from pathlib import Path

import torch

from fastgpt2.cli import run as run_command
from fastgpt2.config import IMPLS
from fastgpt2.errors import UserError
from fastgpt2.generation.stream import stream_text
from fastgpt2.text import load_tokenizer
from fastgpt2.training import checkpoint
from fastgpt2.training.device import DTYPES, resolve_device, resolve_dtype


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="fastgpt2 generate",
        description="Continue a text with a trained model, printed as it is generated.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--run", required=True, type=Path, help="run folder of fastgpt2 train")
    parser.add_argument(
        "--checkpoint", choices=("best", "latest"), default="best", help="which of the run's"
    )
    parser.add_argument("--prompt", default="\n", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="length")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="sharper below 1, flatter above, greedy at 0"
    )
    parser.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="draw from the K most likely tokens only"
    )
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="how many texts")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the computation")
    parser.add_argument("--impl", choices=IMPLS, default="auto", help="of the kernels")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command("generate", lambda: _generate(arguments))


def _generate(arguments: argparse.Namespace) -> None:
    for name, least in (("max_new_tokens", 0), ("temperature", 0), ("top_k", 1), ("samples", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    pick = checkpoint.best if arguments.checkpoint == "best" else checkpoint.latest
    folder = pick(arguments.run)
    tokenizer = load_tokenizer(arguments.run)
    model = checkpoint.load_model(folder, impl=arguments.impl).to(device)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{arguments.run}: the tokenizer has {tokenizer.vocab_size} ids, the model "
            f"{model.config.vocab_size}"
        )
    seed = torch.seed() if arguments.seed is None else arguments.seed
    for i in range(arguments.samples):
        if i:
            print("---")
        print(arguments.prompt, end="", flush=True)
        pieces = stream_text(
            model,
            tokenizer,
            arguments.prompt,
            arguments.max_new_tokens,
            temperature=0.0 if arguments.greedy else arguments.temperature,
            top_k=arguments.top_k,
            seed=seed + i,
            dtype=dtype,
        )
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    raise SystemExit(main())
