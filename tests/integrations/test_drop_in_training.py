"""Training through the drop-in: losses, gradients, checkpointing, autocast, dropout."""

from typing import Any

import pytest
import torch

import fastgpt2
from tests.integrations.tiny_hf import (
    assert_close,
    assert_gradient_close,
    config,
    gradients,
    padding,
    pair,
    tokens,
)

T = 9
MASK = padding(T, (0, 5), (0, T), (3, T))


def both_trained(theirs: Any, ours: Any, **inputs: Any) -> tuple[Any, Any]:
    """One forward and backward pass each; their outputs, once all gradients agree."""
    expected, got = theirs(**inputs), ours(**inputs)
    expected.loss.backward()
    got.loss.backward()
    assert_close(got.loss, expected.loss)
    ours_gradients, theirs_gradients = gradients(ours), gradients(theirs)
    assert ours_gradients.keys() == theirs_gradients.keys() and theirs_gradients
    for name, gradient in theirs_gradients.items():
        assert_gradient_close(ours_gradients[name], gradient)
    return expected, got


LABELS: dict[str, dict[str, Any]] = {
    "labels": {"labels": tokens(3, T)},
    "ignored": {"labels": tokens(3, T).masked_fill(MASK == 0, -100)},
    "shifted by the caller": {
        "labels": tokens(3, T),
        "shift_labels": tokens(3, T, seed=8),
    },
    "items": {"labels": tokens(3, T), "num_items_in_batch": 17},
    "items as a tensor": {"labels": tokens(3, T), "num_items_in_batch": torch.tensor(17)},
    "another ignore_index": {"labels": tokens(3, T), "ignore_index": int(tokens(3, T)[0, 3])},
}


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize("inputs", LABELS.values(), ids=LABELS)
def test_loss_and_gradients_are_theirs(inputs: dict[str, Any], fused: bool) -> None:
    theirs, ours = pair()
    theirs.train(), ours.train()
    ours.fused_loss = fused
    expected, got = both_trained(
        theirs, ours, input_ids=tokens(3, T), attention_mask=MASK, **inputs
    )
    if fused:
        assert got.logits is None and "fused" in ours.explain()
    else:
        assert_close(got.logits, expected.logits)


def test_nothing_kept_is_their_nan_or_their_zero() -> None:
    theirs, ours = pair()
    labels = torch.full((3, T), -100)
    for fused in (False, True):
        ours.train(fused)
        ours.fused_loss = fused
        assert ours(tokens(3, T), labels=labels).loss.isnan()
        assert theirs(tokens(3, T), labels=labels).loss.isnan()
        assert ours(tokens(3, T), labels=labels, num_items_in_batch=5).loss == 0


def test_fused_loss_keeps_logits_wherever_somebody_may_read_them() -> None:
    theirs, ours = pair()
    ids = tokens()
    ours.fused_loss = True
    assert ours(ids, labels=ids).logits is not None
    ours.train()
    assert ours(ids).logits is not None
    assert ours(ids, labels=ids, logits_to_keep=0).logits is None
    assert ours(ids, labels=ids).keys() == theirs(ids, labels=ids).keys() - {"logits"}
    loss, _cache = ours(ids, labels=ids, return_dict=False)
    assert loss.ndim == 0
    handle = ours.lm_head.register_forward_hook(lambda *_: None)
    assert ours(ids, labels=ids).logits is not None and "hooks" in ours.explain()
    handle.remove()
    ours.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 3.0
    assert ours(ids, labels=ids).loss == 3.0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
def test_gradient_checkpointing(reentrant: bool, fused: bool) -> None:
    theirs, ours = pair()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    theirs.train(), ours.train()
    ours.fused_loss = fused
    both_trained(
        theirs,
        ours,
        input_ids=tokens(3, T),
        attention_mask=MASK,
        labels=tokens(3, T),
        use_cache=False,
    )


def test_checkpointing_replays_the_same_dropout() -> None:
    results = []
    for checkpointing in (False, True):
        _, ours = pair(attn_pdrop=0.3, resid_pdrop=0.2, embd_pdrop=0.1)
        ours.train()
        if checkpointing:
            ours.gradient_checkpointing_enable()
        torch.manual_seed(3)
        ours(tokens(), labels=tokens(), use_cache=False).loss.backward()
        results.append(gradients(ours))
    for name, gradient in results[0].items():
        assert_close(results[1][name], gradient)


def test_dropout_acts_in_training_alone() -> None:
    _, ours = pair(attn_pdrop=0.5)
    ids = tokens()
    assert torch.equal(ours(ids).logits, ours(ids).logits)
    ours.train()
    assert not torch.allclose(ours(ids).logits, ours(ids).logits)


def test_gradients_of_the_inputs() -> None:
    theirs, ours = pair()
    results = []
    for model in (theirs, ours):
        embeds = torch.randn(2, T, 24, generator=torch.Generator().manual_seed(1))
        embeds.requires_grad_()
        model(inputs_embeds=embeds, labels=tokens(2, T)).loss.backward()
        results.append(embeds.grad)
    assert_close(results[1], results[0])


def test_frozen_layers() -> None:
    theirs, ours = pair()
    for model in (theirs, ours):
        model.train()
        model.transformer.wte.requires_grad_(False)
        model.transformer.h[0].requires_grad_(False)
        model.transformer.h[1].ln_1.weight.requires_grad_(False)
    for fused in (False, True):
        ours.fused_loss = fused
        ours.zero_grad(), theirs.zero_grad()
        both_trained(theirs, ours, input_ids=tokens(), labels=tokens())
        assert ours.transformer.h[0].attn.c_attn.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
def test_autocast(dtype: torch.dtype, fused: bool) -> None:
    theirs, ours = pair()
    ids = tokens(3, T)
    exact = theirs(ids, labels=ids).loss
    theirs.train(), ours.train()
    ours.fused_loss = fused
    with torch.autocast("cpu", dtype=dtype):
        expected, got = theirs(ids, labels=ids), ours(ids, labels=ids)
    got.loss.backward()
    assert got.loss.dtype == expected.loss.dtype
    assert fused or got.logits.dtype == expected.logits.dtype
    limit = 2 * (expected.loss - exact).abs() + 8 * torch.finfo(dtype).eps
    assert (got.loss - exact).abs() <= limit
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients(ours).values())


def test_ten_steps_of_adamw_follow_theirs() -> None:
    theirs, ours = pair()
    losses = []
    for model in (theirs, ours):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(10):
            loss = model(tokens(seed=step), labels=tokens(seed=step)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(model.eval()(tokens(seed=99), labels=tokens(seed=99)).loss)
    assert_close(losses[1], losses[0], atol=1e-3)


def test_initialisation_is_theirs_from_the_same_seed() -> None:
    import transformers

    torch.manual_seed(5)
    expected = transformers.GPT2LMHeadModel(config()).state_dict()
    torch.manual_seed(5)
    got = fastgpt2.GPT2LMHeadModel(config()).state_dict()
    assert all(torch.equal(got[name], value) for name, value in expected.items())
