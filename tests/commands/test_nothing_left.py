"""A command that fails leaves no folder that it has made, and its error stands alone on a terminal.

A command is a line of ``FAILING``: what it is given, where {out} is a new place, two folders deep.
"""

import gzip
import sys
from pathlib import Path

import pytest

from fastgpt2.__main__ import main
from fastgpt2.config import GPTConfig
from fastgpt2.weights import save
from tests.commands.tiny_command import TEXT, TINY
from tests.weights.conftest import random_checkpoint

BYTES = "--tokenizer=bytes"
FAILING = {
    "train": ["train", "--data", "{bad}", "--out", "{out}", *TINY],
    # into a new folder under runs/
    "train anywhere": ["train", "--data", "{bad}", *TINY],
    "prepare": ["prepare", "--data", "{bad}", "--out", "{out}", "--workers=1", BYTES],
    "prepare --to": [
        *("prepare", "--data", "{bad}", "--out", "{out}", "--workers=1", "--to=nanogpt", BYTES)
    ],
    "prepare --part": [
        *("prepare", "--data", "{bad}", "--out", "{out}", "--workers=1", "--part=1/1", BYTES)
    ],
    # it counts the text of compressed files, for the other parts
    "prepare --part of a compressed file": [
        *("prepare", "--data", "{packed}", "--out", "{out}", "--workers=1", "--part=1/1", BYTES)
    ],
    "convert": ["convert", "{damaged}", "{out}", "--to=hf"],
    "convert to a file": ["convert", "{damaged}", "{out}.pt", "--to=nanogpt"],
    "evaluate": ["evaluate", "{run}", "--data", "{bad}", "--out", "{out}", "--device=cpu"],
    "plot": ["plot", "{empty}", "--out", "{out}.png"],
    "generate": ["generate", "--model", "{run}", "--output", "{out}", "--device=cpu"],
}


@pytest.fixture
def places(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    given = {name: tmp_path / name for name in ("bad", "damaged", "empty")}
    # the damage is found on the way
    given["bad"].write_bytes(TEXT.encode() * 50 + b"\xff")
    given["packed"] = tmp_path / "packed.txt.gz"
    given["packed"].write_bytes(gzip.compress(given["bad"].read_bytes()))
    config = GPTConfig(block_size=8, vocab_size=257, n_layer=2, n_head=1, n_embd=8, gelu="tanh")
    save(random_checkpoint(config), given["damaged"], "openai")
    data = given["damaged"] / "model.ckpt.data-00000-of-00001"
    content = data.read_bytes()
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    given["empty"].mkdir()
    (given["empty"] / "config.toml").write_text("steps = 1\n", encoding="utf-8")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return given | {"run": finished, "out": Path("new", "folder", "out")}


@pytest.mark.parametrize("name", FAILING)
def test_a_failed_command_leaves_nothing(
    name: str,
    places: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv = [word.format(**places) for word in FAILING[name]]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    capsys.readouterr()
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastgpt2 {argv[0]}: error: ") and said.count("\n") == 1, said
    assert not list(Path().iterdir())


def test_a_folder_that_was_there_stays(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("new").mkdir()
    Path("runs").mkdir()
    for name in ("train", "train anywhere", "prepare", "evaluate"):
        assert main([word.format(**places) for word in FAILING[name]]) == 2
        assert sorted(path.name for path in Path().rglob("*")) == ["new", "runs"]
