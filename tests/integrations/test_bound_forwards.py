"""An accelerated model that tools have bound forwards to, or whose masks change unseen."""

from typing import Any

import torch
import transformers
from accelerate import cpu_offload  # type: ignore[import-untyped]
from accelerate.hooks import (  # type: ignore[import-untyped]
    ModelHook,
    add_hook_to_module,
)
from torch import nn

import fastgpt2
from fastgpt2.integrations.huggingface import LayerNorm
from tests.integrations.tiny_hf import assert_close, config, pair, randomised, tokens


def tiny_hf() -> Any:
    """transformers' own model."""
    model: Any = transformers.GPT2LMHeadModel(config())
    return randomised(model)


def test_a_bound_forward_follows_the_class() -> None:
    model = tiny_hf()
    norm = model.transformer.ln_f
    add_hook_to_module(norm, ModelHook())
    fastgpt2.accelerate(model)
    assert norm._old_forward.__func__ is LayerNorm.forward
    fastgpt2.restore(model)
    assert norm._old_forward.__func__ is nn.LayerNorm.forward


def test_a_forward_of_somebody_else_is_not_called_ours() -> None:
    model = tiny_hf()
    norm = model.transformer.ln_f
    norm.forward = lambda x: x
    fastgpt2.accelerate(model)
    assert "not exchanged" in fastgpt2.accelerate(model).explain()


def test_an_offloading_hook_on_the_head_is_called() -> None:
    model = fastgpt2.accelerate(tiny_hf()).train()
    model.fused_loss = True
    assert model._loss_obstacle() is None
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model._loss_obstacle() is not None
    idx = torch.randint(8, (2, 5))
    assert torch.isfinite(model(idx, labels=idx).loss)


def test_a_mask_changed_behind_its_version_is_looked_at_again() -> None:
    model = fastgpt2.accelerate(tiny_hf()).eval()
    idx = torch.randint(8, (1, 6))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        model(idx, attention_mask=mask)
        mask.data[:, :, :, 0] = False
        mask.data[:, :, 0, 0] = True
        found = model(idx, attention_mask=mask).logits
        expected = fastgpt2.restore(model)(idx, attention_mask=mask).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_mask_changed_behind_its_version_and_a_model_without_its_first_layer() -> None:
    """Layers that were left out, or one that is called alone: none of them is the first."""
    theirs, ours = pair(n_layer=3)
    for model in (theirs, ours):
        model.transformer.h = model.transformer.h[1:]
    mask = torch.ones(9, 9, dtype=torch.bool).tril().repeat(3, 1, 1, 1)
    hidden = torch.randn(3, 9, 24)

    def outputs(model: Any) -> list[torch.Tensor]:
        whole = model(tokens(), attention_mask=mask, use_cache=False).logits
        alone = model.transformer.h[1](hidden, attention_mask=mask)
        return [whole, alone[0] if isinstance(alone, tuple) else alone]

    for kept in (9, 7, 4):
        # through numpy, which nobody counts
        mask.numpy()[1, :, :, kept:] = False
        for got, expected in zip(outputs(ours), outputs(theirs), strict=True):
            assert_close(got, expected)


def test_a_batch_without_labels_leaves_finite_weights() -> None:
    model = fastgpt2.accelerate(tiny_hf()).train()
    idx = torch.randint(8, (2, 5))
    for fused in (False, True):
        model.fused_loss = fused
        for items in (None, 0):
            model(idx, labels=torch.full_like(idx, -100), num_items_in_batch=items).loss.backward()
            assert all(p.grad is None or not p.grad.any() for p in model.parameters())
