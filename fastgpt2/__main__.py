"""``fastgpt2 COMMAND ...``: every command of the package under one name."""

import sys
from importlib import import_module
from typing import Any

from fastgpt2 import early
from fastgpt2.cli import run
from fastgpt2.errors import UserError

COMMANDS = {
    "train": "train a GPT-2 on text",
    "generate": "continue a text with a trained model",
    "evaluate": "score models on a text or a task",
    "plot": "compare runs in one picture",
    "prepare": "tokenize a large corpus into shards",
    "convert": "convert weights between formats",
}


def _module(command: str) -> Any:
    """A command is a module, or the ``__main__`` of a package."""
    # importing PyTorch takes seconds
    with early.ending_at_once():
        found = import_module(f"fastgpt2.{command}")
        return import_module(f"{found.__name__}.__main__") if hasattr(found, "__path__") else found


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    return run(command, lambda: _run(command, arguments))


def _run(command: str, arguments: list[str]) -> int:
    if command in COMMANDS:
        return int(_module(command).main(arguments))
    if command not in ("-h", "--help"):
        raise UserError(f"no such command; there are {', '.join(COMMANDS)}")
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    print("usage: fastgpt2 COMMAND [--help] ...\n\ncommands:", *lines, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
