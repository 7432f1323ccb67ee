"""A vocabulary that is padded in memory, and only there: 4100 tokens in 4224 rows."""

import pytest
import torch
from torch import Tensor

from fastgpt2.model import GPT
from tests.tiny_gpt import gradients, tiny_batch, tiny_config, tiny_gpt

V, PADDED = 4100, 4224
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"


@pytest.fixture
def model() -> GPT:
    return tiny_gpt(vocab_size=V)


@pytest.fixture
def unpadded(model: GPT, monkeypatch: pytest.MonkeyPatch) -> GPT:
    """The same model in exactly V rows."""
    monkeypatch.setattr("fastgpt2.config.PAD_VOCAB_FROM", V + 1)
    plain = GPT(model.config)
    plain.load_state_dict(model.state_dict())
    monkeypatch.undo()
    return plain


def test_fresh_padding_is_zero() -> None:
    weight = GPT(tiny_config(vocab_size=V)).lm_head.weight
    assert weight.shape[0] == PADDED
    assert (weight[V:] == 0).all()
    assert (weight[:V] != 0).any(dim=1).all()


def test_parameters_are_counted_without_padding(model: GPT, unpadded: GPT) -> None:
    assert model.get_num_params(non_embedding=False) == sum(
        p.numel() for p in unpadded.parameters()
    )


@pytest.mark.parametrize("fused", [True, False])
def test_loss_and_gradients_are_those_without_padding(
    model: GPT, unpadded: GPT, fused: bool
) -> None:
    idx, targets = tiny_batch(V=V)
    expected = gradients(unpadded, idx, targets, fused_loss=fused)
    # what stands in the padding must not matter
    with torch.no_grad():
        model.lm_head.weight[V:] = 3.0
    result = gradients(model, idx, targets, fused_loss=fused)
    assert (result[WTE][V:] == 0).all()
    result[WTE] = result[WTE][:V]
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], atol=1e-6, rtol=1e-5)


def test_padding_has_no_logits_and_is_never_drawn(model: GPT) -> None:
    idx, targets = tiny_batch(V=V)
    with torch.no_grad():
        # the padding would win every draw
        model.lm_head.weight[V:] = 100.0 * torch.randn(PADDED - V, 48)
    model.eval()
    assert model.logits(idx).shape == (3, 16, V)
    assert model(idx)[0].shape == (3, 1, V)
    assert model(idx, targets)[0].shape == (3, 16, V)
    assert model.generate(idx, 20, temperature=5.0).max() < V
    assert model.generate(idx, 20, temperature=0.0).max() < V


def test_padding_stays_zero_in_training(model: GPT) -> None:
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    for seed in range(3):
        gradients(model, *tiny_batch(V=V, seed=seed))
        optimizer.step()
    assert (model.lm_head.weight[V:] == 0).all()


def test_saved_weights_have_the_true_vocabulary(model: GPT) -> None:
    saved = model.state_dict()
    assert saved[WTE].shape == saved[HEAD].shape == (V, 48)
    other = tiny_gpt(1, vocab_size=V)
    assert other.load_state_dict(saved)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    idx = tiny_batch(V=V)[0]
    assert torch.equal(other.logits(idx), model.logits(idx))


def padded(weight: Tensor) -> Tensor:
    return torch.cat([weight, torch.ones(PADDED - V, 48)])


@pytest.mark.parametrize("form", ["head only", "embedding only", "both", "padded", "padded twice"])
def test_files_of_every_form_load(model: GPT, form: str) -> None:
    saved = model.state_dict()
    weight = saved[WTE].clone()
    match form:
        case "head only":
            del saved[WTE]
        case "embedding only":
            del saved[HEAD]
        case "both":
            saved[WTE] = weight
        case "padded":
            saved[WTE] = padded(weight)
            del saved[HEAD]
        case "padded twice":
            saved[WTE], saved[HEAD] = padded(weight), padded(weight)
    other = tiny_gpt(1, vocab_size=V)
    other.load_state_dict(saved)
    assert other.lm_head.weight is other.transformer.wte.weight
    assert torch.equal(other.state_dict()[HEAD], weight)
    idx, targets = tiny_batch(V=V)
    assert torch.equal(other(idx, targets)[1], model(idx, targets)[1])


def test_a_head_of_its_own_is_refused(model: GPT) -> None:
    saved = model.state_dict()
    saved[HEAD] = saved[HEAD] + 1e-3
    with pytest.raises(ValueError, match=r"lm_head.weight differs from transformer.wte.weight"):
        model.load_state_dict(saved)


@pytest.mark.parametrize("rows", [V - 1, V + 1, PADDED + 1])
def test_another_vocabulary_is_refused(model: GPT, rows: int) -> None:
    saved = model.state_dict()
    saved[WTE] = saved[HEAD] = torch.zeros(rows, 48)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(saved)


def test_loading_a_submodule_of_a_larger_module(model: GPT) -> None:
    """The keys then have a prefix."""
    wrapped, other = (torch.nn.ModuleDict({"gpt": m}) for m in (model, tiny_gpt(1, vocab_size=V)))
    saved = wrapped.state_dict()
    assert saved[f"gpt.{WTE}"].shape[0] == V
    del saved[f"gpt.{HEAD}"]
    other.load_state_dict(saved)
    assert torch.equal(other["gpt"].state_dict()[WTE], model.state_dict()[WTE])
