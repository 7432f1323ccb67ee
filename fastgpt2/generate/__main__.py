"""``python -m fastgpt2.generate``: continue a text with a trained model."""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from fastgpt2.cli import Parser
from fastgpt2.cli import run as run_command
from fastgpt2.config import IMPLS
from fastgpt2.devices import DTYPES, resolve_device, resolve_dtype, resolve_kernels
from fastgpt2.errors import UserError
from fastgpt2.generate.checks import WINDOWS
from fastgpt2.generate.generator import Generator
from fastgpt2.generate.processors import (
    FrequencyPenalty,
    MinP,
    NoRepeatNgram,
    PresencePenalty,
    Processor,
    RepetitionPenalty,
    TopP,
    Typical,
)
from fastgpt2.generate.text import encode_prompt
from fastgpt2.opener import OpenedModel, open_model
from fastgpt2.text import get_tokenizer
from fastgpt2.weights import RELEASES

# flag, type, metavar, help; what is not given changes nothing
_PROCESSOR_FLAGS: tuple[tuple[str, type, str, str], ...] = (
    ("--repetition-penalty", float, "X", "divide by X the score of what was written [1: none]"),
    ("--presence-penalty", float, "X", "subtract X from the score of what was written [0: none]"),
    ("--frequency-penalty", float, "X", "subtract X for each time it was written [0: none]"),
    ("--no-repeat-ngram", int, "N", "write no N tokens in a row twice [any]"),
    ("--top-p", float, "P", "draw from the likeliest tokens that together have P [all]"),
    ("--min-p", float, "P", "draw from tokens at least P times as likely as the best [all]"),
    ("--typical", float, "P", "draw from the most typical tokens that together have P [all]"),
)


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
    for flag, kind, metavar, text in _PROCESSOR_FLAGS:
        draw.add_argument(flag, type=kind, metavar=metavar, help=text)
    draw.add_argument(
        "--seed", type=int, metavar="N", help="the same seed gives the same text [a new one]"
    )
    ends = parser.add_argument_group("where a text ends, and how it gets there")
    ends.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given again [the end-of-text token only]",
    )
    ends.add_argument(
        "--window",
        choices=WINDOWS,
        default="slide",
        help="past the model's context: slide goes on with the last half of the text, stop ends "
        "it, crop recomputes the whole context for each token [%(default)s]",
    )
    ends.add_argument(
        "--draft",
        metavar="MODEL",
        help="a smaller model that proposes tokens: the same text, sooner",
    )
    ends.add_argument(
        "--prompt-lookup",
        type=int,
        default=0,
        metavar="N",
        help="propose up to N tokens that followed the last ones earlier in the text [%(default)s]",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--quantize", choices=("int8",), help="round the weights to 8 bits, a scale per row"
    )
    model.add_argument(
        "--tokenizer", choices=("gpt2", "bytes"), help="of a model that has none beside it"
    )
    model.add_argument("--vocab-dir", metavar="DIR", help="GPT-2's vocabulary files")
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
    opened = _open(arguments, arguments.model)
    tokenizer = opened.tokenizer
    encode_prompt(tokenizer, arguments.prompt)
    processors = _processors(arguments)
    model = opened.load(device, dtype, arguments.impl)
    if arguments.quantize is not None:
        model = model.quantize(arguments.quantize)
    draft = None
    if arguments.draft is not None:
        draft = _open(arguments, arguments.draft).load(device, dtype, arguments.impl)
    generator = Generator(
        model,
        tokenizer,
        batch_size=1,
        window=arguments.window,
        draft=draft,
        prompt_lookup=arguments.prompt_lookup,
    )
    # room above it, so that adding the number of a sample cannot leave what a generator takes
    seed = torch.seed() >> 2 if arguments.seed is None else arguments.seed
    for i in range(arguments.samples):
        if i:
            print("---")
        print(arguments.prompt, end="", flush=True)
        stream = generator.submit(
            arguments.prompt,
            arguments.max_new_tokens,
            temperature=0.0 if arguments.greedy else arguments.temperature,
            top_k=arguments.top_k,
            processors=processors,
            stop=arguments.stop,
            seed=seed + i,
        )
        for piece in stream:
            print(piece, end="", flush=True)
        print()


def _open(arguments: argparse.Namespace, name: str) -> OpenedModel:
    """The model of that name; one that brings no tokenizer gets that of the flags."""
    given = None
    if arguments.tokenizer or arguments.vocab_dir:
        given = get_tokenizer(arguments.tokenizer or "gpt2", vocab_dir=arguments.vocab_dir)
    return open_model(name, tokenizer=given, checkpoint=arguments.checkpoint)


def _processors(arguments: argparse.Namespace) -> list[Processor]:
    """Penalties first, then what keeps likely tokens, in the order of the help text."""
    makers: tuple[tuple[Any, Callable[[Any], Processor]], ...] = (
        (arguments.repetition_penalty, RepetitionPenalty),
        (arguments.presence_penalty, PresencePenalty),
        (arguments.frequency_penalty, FrequencyPenalty),
        (arguments.no_repeat_ngram, NoRepeatNgram),
        (arguments.top_p, TopP),
        (arguments.min_p, MinP),
        (arguments.typical, Typical),
    )
    return [make(value) for value, make in makers if value is not None]


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
