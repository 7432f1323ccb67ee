"""What the tests of the commands share."""

from collections.abc import Callable

import pytest

from fastgpt2.train.__main__ import main as train

TEXT = "".join(f"the {i} cats and {i * i} dogs sat\n" for i in range(40))
SHAPE = ["--model=gpt2-nano", "--block-size=16", "--n-layer=1", "--n-head=1", "--n-embd=8"]
LENGTH = ["--batch-size=2", "--steps=3", "--warmup-steps=1", "--sample-tokens=5"]
TINY = ["--tokenizer=bytes", "--device=cpu", *SHAPE, *LENGTH]


def complaint(
    command: Callable[[list[str]], int], argv: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """The one line that a command says to a mistake."""
    capsys.readouterr()
    try:
        code: object = command(argv)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    name = "train" if command is train else "generate"
    assert lines[0].startswith(f"fastgpt2 {name}: error: ")
    return lines[0].removeprefix(f"fastgpt2 {name}: error: ")
