"""One way to open a model, and the tokenizer that comes with it."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt2 import runs
from fastgpt2.config import GPT2_VOCAB, GPTConfig, padded
from fastgpt2.errors import UserError
from fastgpt2.model import GPT
from fastgpt2.opener import open_model
from fastgpt2.text import BytesTokenizer, CharTokenizer, save_tokenizer
from fastgpt2.weights import Checkpoint, load, save
from tests.weights.conftest import random_checkpoint

SHAPE = GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=2, n_embd=8)


@pytest.mark.parametrize("format", ["nanogpt", "llmc"])
def test_formats_without_a_vocabulary_have_gpt2s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    marker = BytesTokenizer()
    marker.vocab_size = GPT2_VOCAB
    monkeypatch.setattr("fastgpt2.opener.GPT2Tokenizer.load", lambda: marker)
    config = GPTConfig(block_size=8, vocab_size=GPT2_VOCAB, n_layer=1, n_head=2, n_embd=8)
    path = save(random_checkpoint(config), tmp_path / "model", format)
    assert open_model(path).tokenizer is marker


def test_the_tokenizer_fits_the_model(tmp_path: Path) -> None:
    folder = save(random_checkpoint(SHAPE), tmp_path / "run", "fastgpt2")
    with pytest.raises(UserError, match="no tokenizer beside it"):
        open_model(folder)
    assert open_model(folder, tokenizer=BytesTokenizer()).tokenizer.name == "bytes"
    save_tokenizer(CharTokenizer("ab"), folder)
    with pytest.raises(UserError, match="the tokenizer char has 2 ids, the model 257"):
        open_model(folder, tokenizer=BytesTokenizer())
    found = open_model(folder, tokenizer=BytesTokenizer(), override=True).tokenizer
    assert found.name == "bytes"


def test_a_padded_vocabulary_fits() -> None:
    assert padded(257) == 257 and padded(GPT2_VOCAB) == 50304 and padded(50304) == 50304


def test_it_loads(tmp_path: Path) -> None:
    folder = save(random_checkpoint(SHAPE), tmp_path / "run", "fastgpt2")
    save_tokenizer(BytesTokenizer(), folder)
    opened = open_model(folder)
    model = opened.load(torch.device("cpu"), torch.float32, "reference")
    assert isinstance(model, GPT) and not model.training and model.config.impl == "reference"
    weights = load(folder).state_dict()
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in weights.items())


def test_a_run_that_deletes_its_checkpoints_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that trains deletes the best checkpoint when it has a better one."""
    run = save(random_checkpoint(SHAPE), tmp_path / "run", "fastgpt2")
    save_tokenizer(BytesTokenizer(), run)
    first, second = (runs.step_folder(run, step) for step in (0, 1))
    read_state = runs.read_state

    def deleting(path: Path, **options: Any) -> Checkpoint:
        if first.exists():
            os.rename(first, second)
        return load(path, **options)

    monkeypatch.setattr("fastgpt2.opener.load", deleting)
    opened = open_model(run)
    assert opened.path == second
    copy = shutil.copytree(second, tmp_path / "copy")

    def gone_at_once(path: Path, **options: Any) -> Checkpoint:
        found = load(path, **options)
        if options:
            shutil.rmtree(second)
        return found

    monkeypatch.setattr("fastgpt2.opener.load", gone_at_once)
    assert open_model(run).tokenizer.name == "bytes"
    shutil.copytree(copy, second)
    shutil.copytree(second, first)

    def late(folder: Path) -> dict[str, Any]:
        if folder == first:
            shutil.rmtree(first)
        return read_state(folder)

    monkeypatch.setattr(runs, "read_state", late)
    assert runs.best(run) == second
    os.rename(second, first)
    with pytest.raises(UserError, match="step_00000001: the run has deleted this checkpoint"):
        opened.load(torch.device("cpu"), torch.float32)


def test_a_file_that_goes_while_it_is_opened_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch opens it again to map it, and raises no OSError."""
    run = save(random_checkpoint(SHAPE), tmp_path / "run", "fastgpt2")

    def gone(path: str, *_: str) -> None:
        raise RuntimeError(f"unable to open file <{path}> in read-only mode: No such file")

    monkeypatch.setattr("fastgpt2.weights.safetensors_file.safe_open", gone)
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read: .*unable to open"):
        open_model(run)
