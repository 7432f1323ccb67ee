"""Every command line of the documentation is one that its program accepts; nothing is run."""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from fastgpt2.__main__ import COMMANDS
from fastgpt2.errors import UserError
from fastgpt2.generate.flags import check_flags, options_of
from fastgpt2.train.__main__ import _base, _configuration
from fastgpt2.train.config import TrainConfig

HERE = Path(__file__).parents[1]
PAGES = ("*.md", "docs/**/*.md", "kernels/README.md", "benchmarks/*.md")
# programs whose flags are another package's, or that take none
FOREIGN = ("fastgpt2.evaluate.harness", "tools.api")
# says what flags were, not what they are
HISTORY = ("CHANGELOG.md",)
OURS = re.compile(r"^(fastgpt2|tools|benchmarks|docs|tests)(\.\w+)+$")
ENDS = re.compile(r"^([|&;<>]+|#.*|\d?>.*)$")


class Parsed(BaseException):
    """Raised in place of the work of a program, with its parser."""


def blocks(page: str) -> Iterator[str]:
    """The lines of a page's blocks for a shell, continued ones joined."""
    for block in re.findall(r"^```(?:console|bash|sh)\n(.*?)^```", page, re.M | re.S):
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()


def inline(page: str) -> Iterator[str]:
    """A page's inline code, one line each."""
    prose = re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)
    yield from (" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose))


def commands(line: str) -> Iterator[tuple[str, list[str]]]:
    """(module, arguments) of every program of ours that a line starts."""
    if line.startswith(("from ", "import ", ">>>")):
        return
    try:
        words = shlex.split(line.removeprefix("$ ").replace("$(", " ; "), comments=True)
    except ValueError:
        # not a line for a shell
        return
    for i, word in enumerate(words):
        is_module = i > 0 and words[i - 1] == "-m" and (OURS.match(word) or word == "fastgpt2")
        is_script = word == "fastgpt2" and (i == 0 or ENDS.match(words[i - 1]) is not None)
        if not (is_module or is_script):
            continue
        rest = words[i + 1 :]
        end = next((n for n, later in enumerate(rest) if ENDS.match(later)), len(rest))
        arguments = [a for a in rest[:end] if a not in ("...", "…") and "[@]" not in a]
        if word == "fastgpt2":
            if not arguments:
                continue
            word = f"fastgpt2.{arguments.pop(0)}"
        # variables of the shell, [an option], and N: what a user replaces
        variable = r"\$\{.*?\}|\$\w+|(?<![\w.])N(?!\w)"
        yield word, [re.sub(variable, "1", argument.strip("[]")) for argument in arguments]


def documented(lines: Callable[[str], Iterator[str]]) -> list[Any]:
    """Each different command line, as a parameter named by its page and text."""
    found: dict[tuple[str, ...], str] = {}
    for pattern in PAGES:
        for path in sorted(HERE.glob(pattern)):
            for line in lines(path.read_text(encoding="utf-8")):
                for module, arguments in commands(line):
                    found.setdefault((module, *arguments), path.name)
    return [
        pytest.param(key[0], [*key[1:]], id=f"{page}: {shlex.join(key)}")
        for key, page in found.items()
        if key[0] not in FOREIGN and page not in HISTORY
    ]


def parser_of(module: str) -> argparse.ArgumentParser:
    """The parser that a program makes."""

    def parse(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        raise Parsed(parser)

    place = import_module(module)
    if hasattr(place, "__path__"):
        place = import_module(f"{module}.__main__")
    with (
        patch.object(argparse.ArgumentParser, "parse_args", parse),
        patch.object(sys, "argv", [module]),
        pytest.raises(Parsed) as done,
    ):
        place.main()
    parser = done.value.args[0]
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def check_names(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Flags are written in full: a beginning is ambiguous as soon as there is another flag."""
    for argument in arguments:
        if argument.startswith("--"):
            assert argument.partition("=")[0] in parser._option_string_actions, argument


@pytest.mark.parametrize(("module", "arguments"), documented(blocks))
def test_its_program_accepts_it(module: str, arguments: list[str]) -> None:
    parser = parser_of(module)
    check_names(parser, arguments)
    flags = parser.parse_args(arguments)
    # flags that exclude each other, names of settings and their ranges
    if module == "fastgpt2.generate":
        check_flags(flags)
        options_of(flags)
    if module == "fastgpt2.train":
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in vars(flags).items()
        }
        name = given.pop("config", None)
        settings = {k: v for k, v in given.items() if k in TrainConfig.__dataclass_fields__}
        _configuration(_base(name, settings), settings, resume=False)


@pytest.mark.parametrize(("module", "arguments"), documented(inline))
def test_its_program_has_these_flags(module: str, arguments: list[str]) -> None:
    """In a sentence a command may lack what it requires."""
    check_names(parser_of(module), arguments)


def test_the_lines_are_found() -> None:
    modules = {case.values[0] for case in documented(blocks)}
    assert {f"fastgpt2.{command}" for command in COMMANDS} <= modules
    page = (
        "```console\nfastgpt2 train --data a.txt \\\n  --lr 1 | head\n"
        "./x && python -m fastgpt2.plot a b > c  # d\n```\n"
        "Use `python -m fastgpt2.train --part N/2 ...` or\n`fastgpt2 convert\na b`."
    )
    found = [[c for line in kind(page) for c in commands(line)] for kind in (blocks, inline)]
    assert found[0] == [
        ("fastgpt2.train", ["--data", "a.txt", "--lr", "1"]),
        ("fastgpt2.plot", ["a", "b"]),
    ]
    assert found[1] == [
        ("fastgpt2.train", ["--part", "1/2"]),
        ("fastgpt2.convert", ["a", "b"]),
    ]


@pytest.mark.parametrize(
    ("module", "arguments", "error"),
    [
        ("fastgpt2.generate", ["--model", "gpt2", "--top-kk", "3"], AssertionError),
        ("fastgpt2.generate", ["--model", "gpt2", "--no-repeat", "3"], AssertionError),
        ("fastgpt2.generate", ["--model", "gpt2", "--num-beams", "2", "--top-k", "3"], UserError),
        ("fastgpt2.train", ["--batch-size", "many"], SystemExit),
        ("fastgpt2.train", ["--lora-rank", "0"], UserError),
        ("fastgpt2.convert", ["a", "b", "--to", "onnx"], SystemExit),
    ],
)
def test_wrong_lines_are_refused(module: str, arguments: list[str], error: Any) -> None:
    with pytest.raises(error):
        test_its_program_accepts_it(module, arguments)
