import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt2.errors import UserError
from fastgpt2.model import GPT
from fastgpt2.weights import load, save
from fastgpt2.weights.checkpoint import Checkpoint
from fastgpt2.weights.tensors import LazyTensor
from fastgpt2.weights.tf_bundle import Bundle, write_bundle
from tests.weights.conftest import GOLDEN


def test_logits_equal_openais_own_code() -> None:
    model = GPT.from_pretrained(str(GOLDEN)).eval()
    with np.load(GOLDEN / "expected.npz") as expected:
        tokens = torch.from_numpy(expected["tokens"]).long()
        with torch.no_grad():
            logits = model.logits(tokens)
        error = (logits - torch.from_numpy(expected["logits"])).abs().max().item()
        assert float(expected["logits"].std()) > 5
    assert error <= 1e-4


def test_keys_and_values_equal_openais_own_code() -> None:
    from fastgpt2.cache import KVCache

    model = GPT.from_pretrained(str(GOLDEN)).eval()
    with np.load(GOLDEN / "expected.npz") as expected:
        tokens = torch.from_numpy(expected["tokens"]).long()
        present = torch.from_numpy(expected["present"])
    B, T = tokens.shape
    cache = KVCache(model.config, B, T, tokens.device, torch.float32)
    with torch.no_grad():
        model.hidden_states(tokens, cache)
    for layer, cached in enumerate(cache.layers):
        for got, want in zip((cached.k, cached.v), present[:, layer].unbind(1), strict=True):
            assert (got[:, :, :T] - want).abs().max() <= 1e-4


def test_writing_gives_the_same_files(tmp_path: Path) -> None:
    # OpenAI's were written by TensorFlow: ours are the same bytes, index and values
    save(load(GOLDEN), tmp_path / "copy", "openai")
    for path in (tmp_path / "copy").iterdir():
        assert path.read_bytes() == (GOLDEN / path.name).read_bytes(), path.name
    assert len(list((tmp_path / "copy").iterdir())) == 4


def rewrite(folder: Path, change: Any) -> None:
    """Rewrite the folder's checkpoint with its variables changed."""
    bundle = Bundle(folder / "model.ckpt")
    variables = {name: LazyTensor.of(bundle.tensor(name).read().clone()) for name in bundle.entries}
    change(variables)
    write_bundle(folder / "model.ckpt", variables)


def test_unknown_variables_are_listed_and_ignored(openai_folder: Path) -> None:
    def add(variables: dict[str, LazyTensor]) -> None:
        variables["global_step"] = LazyTensor.of(torch.tensor(3))
        variables["model/wte/Adam"] = LazyTensor.of(torch.zeros(257, 128))

    rewrite(openai_folder, add)
    notes = load(openai_folder).notes
    assert notes == ("ignored what is not a weight of GPT-2: 'global_step', 'model/wte/Adam'",)
    assert load(GOLDEN).notes == ()


def test_missing_variable_is_named(openai_folder: Path) -> None:
    rewrite(openai_folder, lambda variables: variables.pop("model/h1/mlp/c_fc/w"))
    with pytest.raises(
        UserError, match=r"model\.ckpt\.index: has no variable 'model/h1/mlp/c_fc/w'"
    ):
        load(openai_folder)


def test_misshaped_variable_is_named(openai_folder: Path) -> None:
    def flatten(variables: dict[str, LazyTensor]) -> None:
        variables["model/h0/attn/c_proj/w"] = LazyTensor.of(torch.zeros(128, 128))

    rewrite(openai_folder, flatten)
    message = r"'model/h0/attn/c_proj/w' has shape \(128, 128\), .* asks for \(1, 128, 128\)"
    with pytest.raises(UserError, match=message):
        load(openai_folder)


def test_wrong_dtype_is_named(openai_folder: Path) -> None:
    def to_int(variables: dict[str, LazyTensor]) -> None:
        variables["model/wpe"] = LazyTensor.of(torch.zeros(64, 128, dtype=torch.int32))

    rewrite(openai_folder, to_int)
    with pytest.raises(UserError, match=r"'transformer\.wpe\.weight' has dtype torch\.int32"):
        load(openai_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"n_embd": 256},
            r"'model/wte' has shape \(257, 128\), hparams.json asks for \(257, 256\)",
        ),
        ({"n_layer": 3}, "has no variable 'model/h2/ln_1/g'"),
        ({"n_layer": 16_384}, "n_layer is 16384, but .* 28 variables"),
        ({"n_layer": 10**12}, "n_layer must be at most 16,384, got 1000000000000"),
        ({"n_layer": True}, "n_layer must be a positive integer, got True"),
        ({"n_ctx": "64"}, "block_size must be a positive integer, got '64'"),
        ({"n_head": 3}, "n_embd must be a multiple of n_head"),
    ],
)
def test_hparams_that_do_not_fit(openai_folder: Path, change: dict[str, Any], message: str) -> None:
    path = openai_folder / "hparams.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load(openai_folder)


def test_hparams_with_fewer_layers_leave_the_others_out(openai_folder: Path) -> None:
    # shapes come from the files, never from a size name
    path = openai_folder / "hparams.json"
    path.write_text(path.read_text("utf-8").replace('"n_layer": 2', '"n_layer": 1'), "utf-8")
    checkpoint = load(openai_folder)
    assert checkpoint.config.n_layer == 1
    assert "and 4 more" in checkpoint.notes[0]


def test_names_in_the_checkpoint_file(openai_folder: Path) -> None:
    for file in openai_folder.glob("model.ckpt.*"):
        file.rename(openai_folder / file.name.replace("model.ckpt", "model-1000"))
    note = openai_folder / "checkpoint"
    # TensorFlow writes the path on the machine of the training
    note.write_text('model_checkpoint_path: "/data/runs/x/model-1000"\n', "utf-8")
    assert isinstance(load(openai_folder), Checkpoint)
    note.unlink()
    assert isinstance(load(openai_folder), Checkpoint)
    note.write_text('model_checkpoint_path: "../../model-1000/.."\n', "utf-8")
    with pytest.raises(UserError, match=r"'\.\.' is not the name of a file"):
        load(openai_folder)
    note.write_text("model_checkpoint_path: 5\n", "utf-8")
    with pytest.raises(UserError, match="no line model_checkpoint_path"):
        load(openai_folder)
