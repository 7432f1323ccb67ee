"""``accelerate`` and ``restore``: every head, in place, and undone exactly."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastgpt2
from fastgpt2.errors import UserError
from fastgpt2.integrations import _obstacle
from fastgpt2.integrations.huggingface import LayerNorm, explain_model
from tests.integrations.tiny_hf import (
    assert_close,
    assert_gradient_close,
    config,
    gradients,
    padding,
    randomised,
    tokens,
)

HEADS = (
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
)


def classes_of(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def outputs(model: Any) -> list[torch.Tensor]:
    ids = tokens(3, 9)
    out = model(ids, attention_mask=padding(9, (0, 5), (0, 9), (0, 2)), use_cache=False)
    return list(out.to_tuple())


@pytest.mark.parametrize("head", HEADS)
def test_every_head_before_during_and_after(head: str) -> None:
    model = randomised(getattr(transformers, head)(config()))
    plain_classes, plain_attributes = classes_of(model), set(vars(model))
    parameters = [id(p) for p in model.parameters()]
    before, settings = outputs(model), model.config.to_dict()

    assert fastgpt2.accelerate(model) is model
    assert "LayerNorm  ours, 5 of 5" in explain_model(model)
    assert "activation ours, 2 of 2" in explain_model(model)
    assert "attention  ours in place of sdpa, in 2 of 2" in explain_model(model)
    assert model.config.to_dict() == settings and model.config._attn_implementation == "sdpa"
    assert [id(p) for p in model.parameters()] == parameters
    for got, expected in zip(outputs(model), before, strict=True):
        assert_close(got, expected)

    once = classes_of(model)
    assert classes_of(fastgpt2.accelerate(model)) == once
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert classes_of(copied) == once

    assert fastgpt2.restore(model) is model
    assert classes_of(model) == plain_classes and set(vars(model)) == plain_attributes
    assert model.config._attn_implementation == "sdpa"
    assert all(map(torch.equal, outputs(model), before))


def test_double_heads_train_as_before() -> None:
    results = []
    for accelerated in (False, True):
        model = randomised(transformers.GPT2DoubleHeadsModel(config()))
        if accelerated:
            fastgpt2.accelerate(model)
        ids = tokens(6, 9).view(3, 2, 9)
        inputs = {"mc_token_ids": torch.full((3, 2), 8), "mc_labels": torch.tensor([0, 1, 1])}
        out = model(ids, labels=ids, **inputs)
        (out.loss + out.mc_loss).backward()
        results.append([out.loss, out.mc_loss, *gradients(model).values()])
    for got, expected in zip(results[1], results[0], strict=True):
        assert_gradient_close(got, expected)


def test_ours_restored_is_theirs() -> None:
    ours = randomised(fastgpt2.GPT2LMHeadModel(config()))
    ours.fused_loss = True
    before = ours(tokens()).logits
    restored = fastgpt2.restore(ours)
    assert type(restored) is transformers.GPT2LMHeadModel and "fused_loss" not in vars(restored)
    assert_close(restored(tokens()).logits, before)


def test_an_attention_that_was_chosen_stays() -> None:
    model = transformers.GPT2LMHeadModel(config(attn_implementation="eager"))
    fastgpt2.accelerate(model)
    assert model.config._attn_implementation == "eager"
    assert "transformers' eager" in explain_model(model)
    assert fastgpt2.restore(model).config._attn_implementation == "eager"


def test_a_gpt2_inside_another_model_and_hooks_on_it() -> None:
    inner = randomised(transformers.GPT2Model(config()))
    seen: list[int] = []
    inner.h[0].ln_1.register_forward_hook(lambda *_: seen.append(1))
    outer = nn.ModuleDict({"gpt2": inner, "norm": nn.LayerNorm(24)})
    before = inner(tokens()).last_hidden_state
    fastgpt2.accelerate(outer)
    assert type(outer["norm"]) is nn.LayerNorm and type(inner.ln_f) is not nn.LayerNorm
    assert_close(inner(tokens()).last_hidden_state, before)
    assert len(seen) == 2


def test_an_encoder_decoder_with_gpt2_behind() -> None:
    encoder = transformers.BertConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=61,
    )
    both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, config())
    model = randomised(transformers.EncoderDecoderModel(both))
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(seed=2)}
    before = model(**inputs).logits
    assert_close(fastgpt2.accelerate(model)(**inputs).logits, before)
    assert type(model.decoder) is fastgpt2.GPT2LMHeadModel
    assert_close(fastgpt2.restore(model)(**inputs).logits, before)


@pytest.mark.parametrize(("C", "H"), [(768, 12), (1024, 16), (1280, 20), (1600, 25)])
def test_the_four_sizes_widths(C: int, H: int) -> None:
    # the vocabulary is cut, nothing else depends on it
    sizes = config(n_embd=C, n_head=H, n_layer=1, n_positions=1024, vocab_size=500)
    torch.manual_seed(0)
    model: Any = transformers.GPT2LMHeadModel(sizes)
    model.eval()
    ids = torch.randint(0, 500, (2, 130))
    before = model(ids).logits
    assert_close(fastgpt2.accelerate(model)(ids).logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_further_from_fp32(dtype: torch.dtype) -> None:
    model = randomised(transformers.GPT2LMHeadModel(config()))
    ids = tokens(4, 16)
    exact = model(ids).logits
    model.to(dtype)
    before = (model(ids).logits.float() - exact).abs()
    after = (fastgpt2.accelerate(model)(ids).logits.float() - exact).abs()
    assert after.max() <= 2 * before.max() and after.mean() <= 1.1 * before.mean()


def test_what_is_no_gpt2_is_refused() -> None:
    for call in (fastgpt2.accelerate, fastgpt2.restore):
        with pytest.raises(UserError, match=r"no GPT-2 of transformers in this Linear"):
            call(nn.Linear(2, 2))


def test_importing_fastgpt2_leaves_transformers_alone() -> None:
    code = "import sys, fastgpt2; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("found", [None, "4.57.1", "5.16.0"])
def test_a_missing_or_old_transformers_is_one_clear_line(found: str | None) -> None:
    code = f"""
import importlib.metadata as metadata
real = metadata.version
def version(name):
    if name != "transformers":
        return real(name)
    if {found!r} is None:
        raise metadata.PackageNotFoundError(name)
    return {found!r}
metadata.version = version
import fastgpt2
try:
    fastgpt2.GPT2LMHeadModel
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.count("\n") == 1 and "pip install 'fastgpt2[hf]'" in run.stdout
    assert ("not installed" if found is None else found) in run.stdout
    assert _obstacle() is None


def test_the_config_of_an_attention_module_is_the_models(tmp_path: Path) -> None:
    model: Any = fastgpt2.accelerate(randomised(transformers.GPT2LMHeadModel(config())))
    expected = model(tokens()).logits
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in (model, copied, pickled):
        attn = twin.transformer.h[0].attn
        assert attn.config is twin.config and type(attn.config) is transformers.GPT2Config
        assert attn.config._attn_implementation == "sdpa" and "ours in place" in twin.explain()
        assert torch.equal(twin(tokens()).logits, expected)
    assert copied.config is not model.config
    model.save_pretrained(tmp_path)
    saved: Any = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert_close(saved.eval()(tokens()).logits, expected)
    attn = model.transformer.h[0].attn
    # what is assigned to it, or in its place, counts
    attn.config.use_cache = False
    assert model(tokens()).past_key_values is None
    attn.config = attn.config
    attn.config._attn_implementation = "eager"
    assert model(tokens(), output_attentions=True).attentions[0] is not None
    model.config._attn_implementation = "sdpa"
    assert vars(fastgpt2.restore(model).transformer.h[0].attn)["config"] is model.config
    assert_close(model(tokens()).logits, expected)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm((3, 8)),
        nn.LayerNorm(8, eps=0.0),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.LayerNorm(8, bias=False),
    ],
    ids=["two dimensions", "eps 0", "no weight", "no bias"],
)
def test_a_layer_norm_of_any_form_is_pytorchs(norm: nn.LayerNorm) -> None:
    ours = copy.deepcopy(norm)
    ours.__class__ = LayerNorm
    results = []
    for module in (norm, ours):
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        module(x).square().sum().backward()
        results.append((module(x).detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
