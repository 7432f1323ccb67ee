"""``fastgpt2 COMMAND ...``: every command of the package under one name."""

import sys
from importlib import import_module
from typing import Any

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
    found = import_module(f"fastgpt2.{command}")
    return import_module(f"{found.__name__}.__main__") if hasattr(found, "__path__") else found


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in COMMANDS:
        return int(_module(arguments[0]).main(arguments[1:]))
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    usage = "usage: fastgpt2 COMMAND [--help] ...\n\ncommands:\n" + "\n".join(lines)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0
    print(f"fastgpt2: error: no command {arguments[0]!r}\n{usage}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
