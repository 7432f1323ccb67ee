"""Our GPT against GPT-2 of the transformers library, with random weights."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fastgpt2.layers import MLP
from fastgpt2.model import GPT
from tests.tiny_gpt import assert_rms_within, gradients, tiny_batch, tiny_config, tiny_gpt

# transformers keeps these as Conv1D, (in, out)
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def theirs(model: GPT) -> Any:
    """GPT-2 of transformers with the weights of ``model``."""
    config = model.config
    options: dict[str, Any] = dict(
        n_positions=config.block_size,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    for name in ("vocab_size", "n_embd", "n_layer", "n_head"):
        options[name] = getattr(config, name)
    other: Any = GPT2LMHeadModel(GPT2Config(**options))
    weights = model.state_dict()
    other.load_state_dict({k: v.T if k.endswith(TRANSPOSED) else v for k, v in weights.items()})
    return other.eval()


def test_state_dict_has_their_keys_and_shapes() -> None:
    model = tiny_gpt()
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {
        name: tuple(value.shape)[:: -1 if name.endswith(TRANSPOSED) else 1]
        for name, value in theirs(model).state_dict().items()
    }
    assert ours == expected


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"impl": "reference"},
        {"n_layer": 1, "n_head": 1, "n_embd": 8},
        {"n_layer": 3, "n_head": 2, "n_embd": 64, "block_size": 7},
        {"vocab_size": 4100},
    ],
    ids=str,
)
def test_logits_are_theirs(fields: dict[str, Any]) -> None:
    model = tiny_gpt(**fields)
    idx = tiny_batch(T=model.config.block_size, V=model.config.vocab_size)[0]
    with torch.no_grad():
        expected = theirs(model)(idx).logits
        torch.testing.assert_close(model.logits(idx), expected, atol=1e-5, rtol=1e-5)


def test_loss_is_theirs() -> None:
    model = tiny_gpt()
    idx = tiny_batch()[0]
    # they shift by themselves
    labels = idx.clone()
    labels[0, 3:6] = -100
    expected = theirs(model)(idx, labels=labels).loss
    torch.testing.assert_close(model(idx[:, :-1], labels[:, 1:])[1], expected)


def test_gelu_is_the_tanh_form() -> None:
    torch.manual_seed(0)
    mlp = MLP(tiny_config(bias=False))
    with torch.no_grad():
        mlp.c_fc.weight.normal_()
    x = torch.randn(50, 48)
    hidden = x @ mlp.c_fc.weight.T
    for approximate, equal in (("tanh", True), ("none", False)):
        expected = F.gelu(hidden, approximate=approximate) @ mlp.c_proj.weight.T
        assert torch.allclose(mlp(x), expected, atol=1e-5) is equal, approximate


def their_gradients(
    model: Any, idx: Tensor, targets: Tensor, *, autocast: bool
) -> dict[str, Tensor]:
    """Loss and gradients under our names, in fp32, with the loss in fp32."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(idx).logits
    loss = F.cross_entropy(
        logits.float().flatten(0, 1), targets.masked_fill(targets == -1, -100).flatten()
    )
    torch.autograd.backward(loss)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.float()} | {
        name: (grad.T if name.endswith(TRANSPOSED) else grad).float()
        for name, grad in grads.items()
    }


@pytest.mark.parametrize("fp32_residual", [False, True])
def test_bf16_rounds_at_most_twice_as_much_as_theirs(fp32_residual: bool) -> None:
    """Theirs with an fp32 residual stream is autocast, without one a model of bf16 weights."""
    model = tiny_gpt(fp32_residual=fp32_residual, impl="torch")
    idx, targets = tiny_batch()
    wide = GPT(tiny_config(impl="reference")).double()
    wide.load_state_dict(model.state_dict())
    gold = gradients(wide, idx, targets)
    gold["logits"] = wide.logits(idx)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradients(model, idx, targets)
        ours["logits"] = model.logits(idx).float()
    other = theirs(model) if fp32_residual else theirs(model).to(torch.bfloat16)
    eager = their_gradients(other, idx, targets, autocast=fp32_residual)
    # one number says too little about rounding
    del ours["loss"], gold["loss"]
    assert_rms_within(ours, eager, gold)
