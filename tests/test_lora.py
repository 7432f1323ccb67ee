"""Low-rank adapters on GPT: what they compute, what they train, and how they are merged."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fastgpt2 import GPT, UserError, add_lora, merge_lora
from fastgpt2.lora import LoRALinear, adapters
from tests.tiny_gpt import gradients, tiny_batch, tiny_gpt

EVERY = ("c_attn", "c_proj", "c_fc")


def with_adapters(seed: int = 0, **options: Any) -> GPT:
    """Adapters on every layer, B not zero."""
    model = tiny_gpt(seed)
    add_lora(model, **(dict[str, Any](rank=3, alpha=6.0, targets=EVERY) | options))
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.normal_(std=0.1)
    return model


def test_an_adapted_model_begins_as_it_was() -> None:
    plain, model = tiny_gpt(), tiny_gpt()
    add_lora(model, rank=4, targets=EVERY)
    idx, _ = tiny_batch()
    assert torch.equal(model.eval().logits(idx), plain.eval().logits(idx))
    assert all(layer.lora_A.abs().max() > 0 for layer in adapters(model).values())


def test_the_update_is_the_formula() -> None:
    layer = nn.Linear(5, 7)
    adapted = LoRALinear(layer, rank=2, scale=1.5, dropout=0.0)
    with torch.no_grad():
        adapted.lora_B.normal_()
    x = torch.randn(3, 5)
    weight = layer.weight + 1.5 * adapted.lora_B @ adapted.lora_A
    expected = x @ weight.T + layer.bias
    torch.testing.assert_close(adapted(x), expected)
    torch.testing.assert_close(adapted.merged()(x), expected)


def test_the_adapters_alone_are_trained() -> None:
    model = with_adapters()
    found = gradients(model, *tiny_batch())
    names = {name for name in found if name != "loss"}
    assert names == {
        f"transformer.h.{i}.{layer}.lora_{part}"
        for i in (0, 1)
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        for part in "AB"
    }
    # a merged weight W + s B A has the gradient dW: that of B is s dW A^T, that of A is s B^T dW
    merged = copy.deepcopy(model)
    merge_lora(merged)
    whole = gradients(merged, *tiny_batch())
    for name, layer in adapters(model).items():
        dw = whole[f"{name}.weight"]
        pairs = ((layer.lora_B, dw @ layer.lora_A.T), (layer.lora_A, layer.lora_B.T @ dw))
        for parameter, expected in pairs:
            torch.testing.assert_close(parameter.grad, 2.0 * expected, rtol=1e-4, atol=1e-6)
    groups = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
    assert {p for group in groups for p in group["params"]} == {
        p for p in model.parameters() if p.requires_grad
    }
    # A and B are matrices: decay pulls the model back to the weights that it began with
    assert groups[0]["weight_decay"] == 0.1 and not groups[1]["params"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_computes_the_same(dtype: torch.dtype) -> None:
    model = with_adapters().eval()
    idx, _ = tiny_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        adapted = model.logits(idx)
        merge_lora(model)
        plain = model.logits(idx)
    scale = plain.float().abs().max()
    assert (adapted.float() - plain.float()).abs().max() <= 8 * torch.finfo(dtype).eps * scale
    assert model.lora is None and not adapters(model)
    assert model.state_dict().keys() == tiny_gpt().state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def test_the_model_says_which_layers_are_called() -> None:
    model = tiny_gpt()
    add_lora(model, rank=2, targets=("h.1.attn.c_proj", "c_fc"))
    lines = model.explain().splitlines()[1:]
    assert lines == [
        f"transformer.h.{name} is called: it is a LoRALinear"
        for name in ("0.mlp.c_fc", "1.attn.c_proj", "1.mlp.c_fc")
    ]


def test_decoding_with_a_cache_equals_the_full_pass() -> None:
    model = with_adapters().eval()
    idx = tiny_batch(B=2, T=4)[0]
    text = model.generate(idx, 6, temperature=0.0)
    for end in range(4, 10):
        assert torch.equal(model.logits(text[:, :end])[:, -1].argmax(-1), text[:, end])


def test_compiled_gradients_are_the_eager_ones() -> None:
    torch._dynamo.reset()
    model = tiny_gpt(n_layer=1)
    add_lora(model, rank=2, targets=EVERY)
    eager = gradients(model, *tiny_batch())
    model.zero_grad()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    compiled(*tiny_batch())[1].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, eager[name], rtol=1e-5, atol=1e-7)


def test_dropout_is_on_the_input_of_a_while_training() -> None:
    layer = LoRALinear(nn.Linear(64, 1, bias=False), rank=1, scale=1.0, dropout=0.5)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.fill_(1.0)
        layer.lora_B.fill_(1.0)
    x = torch.ones(200, 64)
    out = layer(x)
    # a sum of 64 that are 0 or 2
    assert 4 < out.std() < 12 and abs(out.mean() - 64) < 3
    assert torch.equal(layer.eval()(x), torch.full((200, 1), 64.0))


def test_a_quantized_model_cannot_be_adapted() -> None:
    with pytest.raises(UserError, match="no layer is called 'c_attn'; there are no linear layers"):
        add_lora(tiny_gpt().quantize(), rank=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be an integer of 1 or more, got 0"),
        ({"rank": 2, "alpha": -1.0}, "alpha must be greater than 0"),
        ({"rank": 2, "dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"rank": 2, "targets": ("attn",)}, "no layer is called 'attn'; there are c_attn, c_fc"),
        ({"rank": 2, "targets": ("c_attn", "lm_head")}, "no layer is called 'lm_head'"),
        ({"rank": 2, "targets": ()}, "give a layer to adapt"),
    ],
)
def test_what_cannot_be_adapted(options: dict[str, Any], message: str) -> None:
    model = tiny_gpt()
    with pytest.raises(UserError, match=message):
        add_lora(model, **options)
    # nothing has changed
    assert model.lora is None and all(p.requires_grad for p in model.parameters())


def test_adapters_are_not_added_twice_nor_below_a_hook() -> None:
    model = with_adapters()
    with pytest.raises(UserError, match="adapters already"):
        add_lora(model, rank=2)
    merge_lora(model)
    with pytest.raises(UserError, match="no adapters"):
        merge_lora(model)
    layer = model.get_submodule("transformer.h.1.attn.c_attn")
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match=r"h\.1\.attn\.c_attn cannot be adapted: it has hooks"):
        add_lora(model, rank=2)


def test_a_model_with_adapters_is_not_saved_as_a_plain_one(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="has adapters"):
        with_adapters().save_pretrained(tmp_path / "out")
