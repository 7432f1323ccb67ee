"""Every format into every other: same bits, same logits, and what programs of theirs expect."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.weights import FORMATS, load, save
from fastgpt2.weights.formats import detect
from tests.weights.conftest import (
    GOLDEN,
    TINY,
    hf_logits,
    hf_model,
    our_logits,
    random_checkpoint,
    same_bits,
)


@pytest.mark.parametrize(("first", "second"), list(product(FORMATS, repeat=2)))
def test_openai_to_every_format_and_back_is_exact(tmp_path: Path, first: str, second: str) -> None:
    path = save(load(GOLDEN), tmp_path / "first", first)
    path = save(load(path), tmp_path / "second", second)
    assert detect(tmp_path / "second")[0] == second
    path = save(load(path), tmp_path / "third", "openai")
    for name in ("model.ckpt.index", "model.ckpt.data-00000-of-00001", "hparams.json"):
        assert (path / name).read_bytes() == (GOLDEN / name).read_bytes()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept_or_widened(tmp_path: Path, format: str, dtype: torch.dtype) -> None:
    checkpoint = random_checkpoint(TINY, dtype)
    back = load(save(checkpoint, tmp_path / "x", format))
    expected = dtype if dtype in FORMATS[format].dtypes else torch.float32
    assert back.dtype == expected
    assert same_bits(back, checkpoint.to(expected))
    assert back.config == TINY


@pytest.mark.parametrize("format", FORMATS)
def test_explicit_dtype(tmp_path: Path, format: str) -> None:
    checkpoint = random_checkpoint(TINY)
    if torch.bfloat16 not in FORMATS[format].dtypes:
        with pytest.raises(UserError, match=f"format {format} holds float32, not bfloat16"):
            save(checkpoint, tmp_path / "x", format, dtype=torch.bfloat16)
        assert not (tmp_path / "x").exists()
        return
    back = load(save(checkpoint, tmp_path / "x", format, dtype=torch.bfloat16))
    assert same_bits(back, checkpoint.to(torch.bfloat16))


# the widths and heads of the four releases, one layer deep; the first with a padded vocabulary
@pytest.mark.parametrize(
    ("name", "vocab_size"),
    [("gpt2", 4999), ("gpt2-medium", 515), ("gpt2-large", 515), ("gpt2-xl", 515)],
)
def test_logits_of_every_size_from_every_format(tmp_path: Path, name: str, vocab_size: int) -> None:
    config = GPTConfig.preset(name, n_layer=1, vocab_size=vocab_size, block_size=64)
    theirs = hf_model(config)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = torch.randint(vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = hf_logits(theirs, tokens)
    assert expected.std() > 0.5
    checkpoint = load(tmp_path / "theirs")
    assert replace(checkpoint.config, dropout=0.0) == config
    for format in FORMATS:
        path = save(checkpoint, tmp_path / format, format)
        assert (our_logits(path, tokens) - expected).abs().max() <= 1e-4


def test_run_folder_gives_its_best_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint in it"):
        load(run)
    dtypes = {900: torch.float32, 1000: torch.bfloat16, 1100: torch.float16}
    for step, dtype in dtypes.items():
        save(random_checkpoint(TINY, dtype), tmp_path / str(step), "fastgpt2")
        folder = run / f"checkpoints/step_{step:08}"
        (tmp_path / str(step) / "checkpoints/step_00000000").rename(folder)
    (run / "checkpoints/.step_00002000.tmp").mkdir()
    (run / "checkpoints/step_00003000").mkdir()
    # no loss was measured: the newest that is whole
    assert load(run).dtype == torch.float16
    for step, loss in ((900, 4.0), (1000, 3.0), (1100, None)):
        state = {"step": step, "validation": None if loss is None else {"loss": loss}}
        path = run / f"checkpoints/step_{step:08}/state.json"
        path.write_text(json.dumps(state), "utf-8")
    assert load(run).dtype == torch.bfloat16
    assert load(run / "checkpoints/step_00000900").dtype == torch.float32
    # a file of weights stands for its folder
    assert load(run / "checkpoints/step_00000900/model.safetensors").dtype == torch.float32


def test_every_field_of_the_configuration_is_kept_in_our_folder(tmp_path: Path) -> None:
    config = replace(TINY, dropout=0.2, embd_dropout=0.0, impl="torch", fp32_residual=True)
    folder = save(random_checkpoint(config), tmp_path / "x", "fastgpt2")
    assert load(folder).config == config
    path = folder / "checkpoints/step_00000000/gpt_config.json"
    path.write_text(path.read_text("utf-8").replace("n_head", "n_heads"), "utf-8")
    with pytest.raises(UserError, match="unknown key 'n_heads'; did you mean 'n_head'"):
        load(folder)


def test_saving_replaces_nothing(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(TINY)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x", "utf-8")
    (tmp_path / "mine.pt").write_text("x", "utf-8")
    with pytest.raises(UserError, match="exists already and is not empty"):
        save(checkpoint, tmp_path / "full", "hf")
    with pytest.raises(UserError, match="exists already"):
        save(checkpoint, tmp_path / "mine.pt", "nanogpt")
    (tmp_path / "empty").mkdir()
    save(checkpoint, tmp_path / "empty", "hf")
    assert same_bits(load(tmp_path / "empty"), checkpoint)


@pytest.mark.parametrize("format", FORMATS)
def test_failed_saving_leaves_nothing(tmp_path: Path, format: str) -> None:
    checkpoint = random_checkpoint(TINY)

    def fail() -> torch.Tensor:
        raise UserError("the values have a wrong CRC")

    name = "transformer.ln_f.bias"
    tensors = {**checkpoint.tensors, name: replace(checkpoint.tensors[name], read=fail)}
    with pytest.raises(UserError, match="wrong CRC"):
        save(replace(checkpoint, tensors=tensors), tmp_path / "x", format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x", "x.pt"])
def test_place_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(UserError, match=f"file/{name}: cannot be written: File exists"):
        save(random_checkpoint(TINY), tmp_path / "file" / name, "nanogpt")


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no model found"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello", "utf-8")
    with pytest.raises(UserError, match=r"notes.txt: neither"):
        load(tmp_path / "notes.txt")
