"""nanoGPT's ckpt.pt: what its train.py saves, and what it resumes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.model import GPT
from fastgpt2.weights import Checkpoint, load, save
from tests.weights.conftest import TINY, our_logits, random_checkpoint, same_bits


def nanogpt_content(checkpoint: Checkpoint, padded: int = 0) -> dict[str, Any]:
    """What nanoGPT's train.py saves."""
    state = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    wte = torch.nn.functional.pad(state["transformer.wte.weight"], (0, 0, 0, padded))
    config = checkpoint.config
    args = {
        key: getattr(config, key)
        for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    }
    return {
        "model": {**state, "transformer.wte.weight": wte, "lm_head.weight": wte},
        "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": []},
        "model_args": args | {"vocab_size": config.vocab_size + padded},
        "iter_num": 5,
        "best_val_loss": torch.tensor(3.5),
        "config": {"dataset": "shakespeare_char", "learning_rate": 1e-3, "compile": True},
    }


def test_nanogpt_compiled_with_masks_and_without_bias(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(replace(TINY, bias=False))
    content = nanogpt_content(checkpoint)
    for i in range(TINY.n_layer):
        content["model"][f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    content["model"] = {f"_orig_mod.{name}": t for name, t in content["model"].items()}
    torch.save(content, tmp_path / "ckpt.pt")
    back = load(tmp_path)
    assert same_bits(back, checkpoint)
    assert back.config == replace(TINY, bias=False, gelu="erf")
    # formats with biases get zeros, which is the same function
    tokens = torch.arange(16)[None]
    path = save(back, tmp_path / "hf", "hf")
    assert torch.equal(our_logits(path, tokens), our_logits(tmp_path / "ckpt.pt", tokens))


def test_nanogpt_padded_vocabulary_is_cut(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(replace(TINY, vocab_size=50257, n_embd=4, n_layer=1))
    torch.save(nanogpt_content(checkpoint, padded=47), tmp_path / "ckpt.pt")
    back = load(tmp_path / "ckpt.pt")
    assert back.config.vocab_size == 50257
    assert same_bits(back, checkpoint)
    assert back.notes == ("cut the vocabulary from 50304 padded rows to GPT-2's 50257",)


def test_nanogpt_old_model_args(tmp_path: Path) -> None:
    content = nanogpt_content(random_checkpoint(TINY))
    del content["model_args"]["bias"], content["model_args"]["dropout"]
    torch.save(content, tmp_path / "ckpt.pt")
    assert load(tmp_path).config == replace(TINY, gelu="erf")
    del content["model_args"]["n_head"]
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"ckpt\.pt: 'n_head' is missing"):
        load(tmp_path)


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_can_resume_what_we_write(tmp_path: Path, bias: bool) -> None:
    checkpoint = random_checkpoint(replace(TINY, bias=bias))
    save(checkpoint, tmp_path / "ckpt.pt", "nanogpt")
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    # the steps of nanoGPT's train.py with init_from = "resume"
    keys = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    model = GPT(GPTConfig(**{key: content["model_args"][key] for key in keys}))
    model.load_state_dict(content["model"])
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    optimizer.load_state_dict(content["optimizer"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert (content["iter_num"], content["best_val_loss"]) == (0, 1e9)
    before = model.lm_head.weight.detach().clone()
    model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))[1].backward()
    optimizer.step()
    assert not torch.equal(before, model.lm_head.weight)
    # one tensor under two names, not two
    head, wte = content["model"]["lm_head.weight"], content["model"]["transformer.wte.weight"]
    assert head.data_ptr() == wte.data_ptr()


def test_strided_and_offset_tensors_of_torch_files(tmp_path: Path) -> None:
    content = nanogpt_content(random_checkpoint(TINY))
    name = "transformer.h.1.mlp.c_fc.weight"
    expected = content["model"][name].clone()
    content["model"][name] = expected.t().contiguous().t()
    big = torch.zeros(9, 32)
    big[3] = content["model"]["transformer.ln_f.bias"]
    content["model"]["transformer.ln_f.bias"] = big[3]
    torch.save(content, tmp_path / "ckpt.pt")
    assert same_bits(load(tmp_path), random_checkpoint(TINY))
    assert torch.equal(load(tmp_path).state_dict()[name], expected)
    assert load(tmp_path).state_dict()[name].is_contiguous()
