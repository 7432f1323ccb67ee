"""``python -m fastgpt2.generate``: continue a text with a trained model."""

import argparse

import torch

from fastgpt2.cli import Parser
from fastgpt2.cli import run as run_command
from fastgpt2.config import IMPLS
from fastgpt2.devices import DTYPES, resolve_device, resolve_dtype, resolve_kernels
from fastgpt2.errors import UserError
from fastgpt2.generate.stream import encode_prompt, stream_text
from fastgpt2.opener import open_model
from fastgpt2.weights import RELEASES


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog="fastgpt2 generate",
        description="Continue a text with a trained model, printed as it is generated.",
    )
    what = parser.add_argument_group("what")
    what.add_argument(
        "--model",
        "--run",
        required=True,
        metavar="MODEL",
        help="run folder, a folder or file in any format that convert reads, or one of "
        + ", ".join(RELEASES),
    )
    what.add_argument(
        "--checkpoint",
        choices=("best", "latest"),
        default="best",
        help="the one of lowest validation loss, or the newest [%(default)s]",
    )
    what.add_argument(
        "--prompt", metavar="TEXT", default="\n", help="text to continue [a line break]"
    )
    what.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="length [%(default)s]"
    )
    what.add_argument(
        "--samples", type=int, default=1, metavar="N", help="how many texts [%(default)s]"
    )
    draw = parser.add_argument_group("sampling")
    draw.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="below 1 safer, above 1 wilder, 0 is greedy [%(default)s]",
    )
    draw.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    draw.add_argument(
        "--top-k", type=int, metavar="K", help="draw from the K most likely tokens only [all]"
    )
    draw.add_argument(
        "--seed", type=int, metavar="N", help="the same seed gives the same text [a new one]"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... [auto]")
    machine.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of weights and computation [%(default)s]"
    )
    machine.add_argument(
        "--impl", choices=IMPLS, default="auto", help="implementation of the kernels [%(default)s]"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command("generate", lambda: _generate(arguments))


def _generate(arguments: argparse.Namespace) -> None:
    _check(arguments)
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    resolve_kernels(device, dtype, arguments.impl)
    opened = open_model(arguments.model, checkpoint=arguments.checkpoint)
    tokenizer = opened.tokenizer
    encode_prompt(tokenizer, arguments.prompt)
    model = opened.load(device, dtype, arguments.impl)
    # room above it, so that adding the number of a sample cannot leave what a generator takes
    seed = torch.seed() >> 2 if arguments.seed is None else arguments.seed
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
        )
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (
        ("max_new_tokens", 0),
        ("samples", 1),
        ("temperature", 0),
        ("top_k", 1),
        ("seed", 0),
    ):
        value = getattr(arguments, name)
        # written so that NaN fails too
        if value is not None and not least <= value <= 2**62:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} must be a number from {least} to 2^62, got {value}")
    try:
        arguments.prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("--prompt is not UTF-8 text") from None


if __name__ == "__main__":
    raise SystemExit(main())
