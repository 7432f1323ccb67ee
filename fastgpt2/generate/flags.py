"""Which flags of ``generate`` go together, and the options that they give a text."""

import argparse
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from fastgpt2.errors import UserError
from fastgpt2.generate.options import Options
from fastgpt2.text.utf8 import is_utf8

_NUMBERS = (
    ("max_new_tokens", 0),
    ("min_new_tokens", 0),
    ("samples", 1),
    ("best_of", 1),
    ("num_beams", 1),
    ("batch_size", 1),
    ("temperature", 0),
    ("top_k", 1),
    ("seed", 0),
    ("prompt_lookup", 0),
)
_OPTIONS = tuple(field.name for field in fields(Options))
# options that draw or follow several texts
_SEVERAL = ("samples", "best_of", "num_beams", "length_penalty", "early_stopping")
# a mode, and the flags that have no meaning in it
_WITHOUT = {
    "score": (
        *_OPTIONS,
        *("greedy", "draft", "prompt_lookup", "window", "interactive"),
    ),
    "interactive": (*_SEVERAL, "input", "output", "batch_size"),
    "input": ("prompt",),
    "greedy": ("temperature",),
    "draft": ("prompt_lookup",),
    "overwrite": ("resume",),
}


def options_of(arguments: argparse.Namespace) -> Options:
    """The options that the flags give the texts of all prompts.

    Args:
        arguments: the parsed flags.

    Raises:
        UserError: a value is not in its range, or two exclude each other.
    """
    given = {name: getattr(arguments, name, None) for name in _OPTIONS if name != "seed"}
    if arguments.greedy:
        given["temperature"] = 0.0
    return Options().replaced({name: value for name, value in given.items() if value is not None})


def check_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that exclude each other, or mean nothing together.

    Args:
        arguments: the parsed flags; one that was not given is None, False or empty.

    Raises:
        UserError: names the two flags, or the flag and its value.
    """
    for name, least in _NUMBERS:
        value = getattr(arguments, name)
        # written so that NaN fails too
        if value is not None and not least <= value <= 2**62:
            raise UserError(f"{_flag(name)} must be a number from {least} to 2^62, got {value}")
    _check_text("prompt", [arguments.prompt] if arguments.prompt is not None else [])
    _check_text("stop", arguments.stop)
    for mode, others in _WITHOUT.items():
        if not _is_given(arguments, mode):
            continue
        for name in others:
            if _is_given(arguments, name):
                raise UserError(f"{_flag(mode)} and {_flag(name)} exclude each other")
    aid = next((n for n in ("draft", "prompt_lookup") if _is_given(arguments, n)), None)
    if aid is not None and (arguments.num_beams or 1) > 1:
        raise UserError(f"--num-beams and {_flag(aid)} exclude each other")
    for name in ("overwrite", "resume"):
        if getattr(arguments, name) and arguments.output in (None, "-"):
            raise UserError(f"{_flag(name)} is for --output FILE")
    if arguments.score and arguments.prompt is None and arguments.input is None:
        raise UserError("--score: give the text by --prompt or --input")
    _check_files(arguments)


def _check_text(name: str, texts: Iterable[str]) -> None:
    for text in texts:
        if not is_utf8(text):
            raise UserError(f"{_flag(name)} is not UTF-8 text")


def _check_files(arguments: argparse.Namespace) -> None:
    """Refuse results that would replace the prompts."""
    if arguments.input in (None, "-") or arguments.output in (None, "-"):
        return
    source, target = Path(arguments.input), Path(arguments.output)
    if source.exists() and target.exists() and source.samefile(target) and target.is_file():
        raise UserError(f"--output: {target} is the file of --input")


def _is_given(arguments: argparse.Namespace, name: str) -> bool:
    # a 0 was given, too
    value = getattr(arguments, name, None)
    return value is not None and value is not False and value != []


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
