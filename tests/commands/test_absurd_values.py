"""Every flag of every command with values that make no sense: one clear line, and nothing left.

A command is a line of ``COMMANDS``: its flags come from its parser, the values from their kinds.
"""

import argparse
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastgpt2.convert import build_parser as convert_flags
from fastgpt2.convert import main as convert
from fastgpt2.evaluate import report
from fastgpt2.evaluate.__main__ import build_parser as evaluate_flags
from fastgpt2.evaluate.__main__ import main as evaluate
from fastgpt2.generate.__main__ import build_parser as generate_flags
from fastgpt2.generate.__main__ import main as generate
from fastgpt2.picture import new_figure
from fastgpt2.plot import build_parser as plot_flags
from fastgpt2.plot import main as plot
from fastgpt2.prepare import build_parser as prepare_flags
from fastgpt2.prepare import main as prepare
from fastgpt2.train.__main__ import build_parser as train_flags
from fastgpt2.train.__main__ import main as train
from tests.commands.tiny_command import TINY

Argv = list[str]


class Command(NamedTuple):
    main: Callable[[Argv], int]
    flags: Callable[[], argparse.ArgumentParser]
    # what is always given; a flag given again after it counts
    always: Argv


COMMANDS = {
    "train": Command(train, train_flags, ["--data={text}", *TINY, "--out={out}"]),
    "generate": Command(generate, generate_flags, ["--model={run}", "--device=cpu"]),
    "evaluate": Command(evaluate, evaluate_flags, ["{run}", "--data={text}", "--device=cpu"]),
    "convert": Command(convert, convert_flags, ["{run}", "{out}", "--to=fastgpt2"]),
    "prepare": Command(prepare, prepare_flags, ["--data={text}", "--out={out}", "--workers=1"]),
    "plot": Command(plot, plot_flags, ["{run}", "--out={out}.png"]),
}
NUMBERS = ("-1", "nan", "1e400", "9" * 5000, "")
NAMES = (
    *("", "a\0b", "a" * 300, "folder", "/proc/self/mem", "null", "socket", "text.txt/x"),
    *("\udce9/x", "-"),
)
# flags for which a value that looks absurd means something
MEANT = {
    # penalties, exponents: any number; a seed that is none is drawn
    ("generate", "presence_penalty", "-1"),
    ("generate", "frequency_penalty", "-1"),
    ("generate", "length_penalty", "-1"),
}
# their values are texts, which may be anything or are tested elsewhere, and no files
TEXTS = {"prompt", "stop", "sample_prompt", "text_column", "freeze", "lora_target", "log"}
TEXTS |= {"device", "part", "help"}


@pytest.fixture
def places(
    finished: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """The words in a command, and the odd files of ``NAMES`` in the working directory."""
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS.values():
        # a parser takes longer to build than to use
        parser = command.flags()
        monkeypatch.setattr(f"{command.main.__module__}.build_parser", lambda p=parser: p)
    monkeypatch.setattr(report, "draw_text_scores", lambda *_: True)
    monkeypatch.setattr("fastgpt2.plot.paint_runs", lambda _: new_figure(0.2, 0.2))
    Path("folder").mkdir()
    Path("text.txt").symlink_to(data)
    Path("null").symlink_to(os.devnull)
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("socket")
    return {"text": data, "run": str(finished), "out": "out"}


def said(main: Callable[[Argv], int], argv: Argv, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a mistake."""
    capsys.readouterr()
    try:
        code: Any = main(argv)
    except SystemExit as exit:
        code = exit.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2, (argv, code)
    assert len(lines) == 1 and " error: " in lines[0], (argv, lines)
    return lines[0]


def cases(name: str) -> Iterator[tuple[str, str, Argv]]:
    """Each flag with each value that it cannot have: the flag, the value, the arguments."""
    command = COMMANDS[name]
    for action in command.flags()._actions:
        if action.nargs == 0 or action.dest in TEXTS:
            continue
        numeric = action.type in (int, float) or action.dest == "batch_size"
        values = NUMBERS if numeric else ("", "\udce9") if action.choices else NAMES
        for value in values:
            if (name, action.dest, value) in MEANT:
                continue
            yield action.dest, value, with_flag(command.always, action, value)


def with_flag(always: Argv, action: argparse.Action, value: str) -> Argv:
    if action.option_strings:
        return [*always, f"{action.option_strings[0]}={value}"]
    # the first or the second of the positional arguments
    place = 1 if action.dest == "dst" else 0
    return [*always[:place], value, *always[place + 1 :]]


def is_fine(name: str, dest: str, value: str) -> bool:
    """Whether the value means something there, odd as it is."""
    if dest == "out":
        return value == "-" or value == "folder" or (value.startswith("\udce9") and name != "train")
    if dest == "output":
        return value in ("-", "null")
    if dest == "dst":
        return value in ("folder", "-", "\udce9/x")
    return dest in ("input", "replay", "init_from") and value == "-"


@pytest.mark.skipif(os.name == "nt", reason="sockets and devices as files")
@pytest.mark.parametrize("name", COMMANDS)
def test_absurd_values(
    name: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(map(str, tmp_path.rglob("*")))
    count = 0
    for dest, value, argv in cases(name):
        if is_fine(name, dest, value):
            continue
        line = said(
            COMMANDS[name].main,
            [re.sub(r"\{(\w+)\}", lambda m: places[m[1]], x) for x in argv],
            capsys,
        )
        assert line.startswith(f"fastgpt2 {name}: error: ")
        count += 1
    assert count >= len(NAMES)
    # what failed has made nothing
    assert sorted(map(str, tmp_path.rglob("*"))) == before
