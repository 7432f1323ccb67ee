"""Hugging Face's folders, in every form they come in, and transformers on what we write."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt2.errors import UserError
from fastgpt2.weights import load, save
from tests.weights.conftest import (
    GOLDEN,
    TINY,
    hf_logits,
    hf_model,
    our_logits,
    random_checkpoint,
    same_bits,
)


def test_exported_folder_loads_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = save(load(GOLDEN), tmp_path / "hf", "hf")
    model, info = transformers.GPT2LMHeadModel.from_pretrained(path, output_loading_info=True)
    assert all(not problems for problems in info.values()), info
    with np.load(GOLDEN / "expected.npz") as expected:
        tokens = torch.from_numpy(expected["tokens"]).long()
        logits = torch.from_numpy(expected["logits"])
    assert (hf_logits(model.eval(), tokens) - logits).abs().max() <= 1e-4
    assert model.dtype == torch.float32
    assert transformers.AutoModelForCausalLM.from_pretrained(path).config.n_ctx == 64


def test_transformers_keeps_the_exported_dtype(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = save(load(GOLDEN), tmp_path / "hf", "hf", dtype=torch.bfloat16)
    model = transformers.GPT2LMHeadModel.from_pretrained(path, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.config.dtype == torch.bfloat16


def hf_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "form", ["sharded", "bin", "old bin", "sharded bin", "bare", "masks", "head only"]
)
def test_forms_of_hugging_face_folders(tmp_path: Path, form: str) -> None:
    from safetensors.torch import save_file

    model = hf_model(TINY)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if form == "sharded" else "5GB")
    if form == "sharded":
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
        assert load(tmp_path).source.name == "model.safetensors.index.json"
        tokens = torch.arange(16)[None]
        assert (our_logits(tmp_path, tokens) - hf_logits(model, tokens)).abs().max() <= 1e-5
        return
    # kept apart: the original goes
    expected = load(save(load(tmp_path), tmp_path / "kept", "hf"))
    (tmp_path / "model.safetensors").unlink()
    state = hf_state(model)
    if form == "bare":
        state = {
            name.removeprefix("transformer."): tensor
            for name, tensor in state.items()
            if name != "lm_head.weight"
        }
    if form == "masks":
        for i in range(TINY.n_layer):
            state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).bool().tril()
            state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    if form == "head only":
        del state["transformer.wte.weight"]
    if form == "sharded bin":
        names = {name: f"part-{len(name) % 2}.bin" for name in state}
        for file in set(names.values()):
            part = {name: state[name] for name in state if names[name] == file}
            torch.save(part, tmp_path / file)
        index = {"metadata": {}, "weight_map": names}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index), "utf-8")
    elif form.endswith("bin"):
        old = form == "old bin"
        path = tmp_path / "pytorch_model.bin"
        torch.save(state, path, _use_new_zipfile_serialization=not old)
    else:
        save_file(state, tmp_path / "model.safetensors")
    assert same_bits(load(tmp_path), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"activation_function": "relu"}, "activation_function = 'relu' is not one of gelu_new,"),
        ({"activation_function": ["gelu"]}, r"activation_function = \['gelu'\] is not one of"),
        ({"n_inner": 100}, "n_inner = 100, expected 128"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"n_embd": None}, "n_embd must be a positive integer, got None"),
        ({"n_layer": 10**30}, "n_layer is out of all bounds: 1000000000000000000000000000000"),
        (
            {"n_positions": 17},
            r"'transformer.wpe.weight' has shape \(16, 32\), expected \(17, 32\)",
        ),
        ({"vocab_size": 64}, r"'transformer.wte.weight' has shape \(65, 32\), expected \(64, 32\)"),
        ({"n_layer": 1}, r"unexpected 'transformer.h.1.attn.c_attn.bias', .* and 4 more"),
        ({"n_layer": 3}, r"missing 'transformer.h.2.ln_1.weight', .* and 4 more"),
        ({"attn_pdrop": 1.5}, "dropout must be in"),
    ],
)
def test_options_that_are_not_gpt2s(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = save(random_checkpoint(TINY), tmp_path / "hf", "hf")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    with pytest.raises(UserError, match=message):
        load(folder)


def test_untied_head_is_refused(tmp_path: Path) -> None:
    folder = save(random_checkpoint(TINY), tmp_path / "hf", "hf")
    state = hf_state(hf_model(TINY))
    state["lm_head.weight"][3, 4] += 1e-6
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"'lm_head.weight' differs from 'transformer.wte.weight'"):
        load(folder)


def test_extra_head_is_refused_by_name(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = hf_model(TINY).config
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"unexpected 'transformer.score.weight'"):
        load(tmp_path)


def test_dropout_rates_travel(tmp_path: Path) -> None:
    rates = {"attn_dropout": 0.1, "embd_dropout": 0.2, "resid_dropout": 0.0}
    checkpoint = random_checkpoint(replace(TINY, **rates))  # type: ignore[arg-type]
    config = load(save(checkpoint, tmp_path / "x", "hf")).config
    assert (config.attn_p, config.embd_p, config.resid_p) == (0.1, 0.2, 0.0)
    config = load(save(random_checkpoint(replace(TINY, dropout=0.3)), tmp_path / "y", "hf")).config
    assert config == replace(TINY, dropout=0.3)
