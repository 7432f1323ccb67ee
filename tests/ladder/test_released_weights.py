from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt2 import GPT, GPTConfig, UserError
from fastgpt2.ladder import (
    GPTModel,
    from_fastgpt2,
    load_weights_into_gpt,
    openai_params,
    to_fastgpt2,
)
from tests.ladder.tiny import SMALL, model, tokens

GOLDEN = Path(__file__).parents[1] / "golden" / "openai-tiny"


def random_gpt(seed: int = 0, **changes: Any) -> GPT:
    torch.manual_seed(seed)
    fields: dict[str, Any] = dict(vocab_size=97, block_size=16, n_embd=24, n_head=3, n_layer=2)
    gpt = GPT(GPTConfig(**(fields | changes)))
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return gpt.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_packages_model_gives_the_same_logits(dtype: torch.dtype, bias: bool) -> None:
    gpt, idx = random_gpt(bias=bias).to(dtype), tokens(3, 16)
    ladder = from_fastgpt2(gpt)
    expected = gpt.logits(idx)
    assert ladder(idx).dtype == dtype
    torch.testing.assert_close(ladder(idx), expected)
    assert expected.std() > 0.1
    assert not ladder.training


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_ladders_model_gives_the_same_logits(dtype: torch.dtype, qkv_bias: bool) -> None:
    ladder, idx = model(qkv_bias=qkv_bias, drop_rate=0.2).to(dtype), tokens(3, 16)
    ladder.out_head.weight = ladder.tok_emb.weight
    gpt = to_fastgpt2(ladder)
    torch.testing.assert_close(gpt.logits(idx), ladder(idx))
    assert gpt.config.dropout == 0.2
    assert not gpt.training


def test_there_and_back_is_the_same_bit_for_bit() -> None:
    gpt = random_gpt(dropout=0.1)
    back = to_fastgpt2(from_fastgpt2(gpt))
    assert back.config == gpt.config
    for name, tensor in gpt.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    ladder = model()
    ladder.out_head.weight = ladder.tok_emb.weight
    again = from_fastgpt2(to_fastgpt2(ladder))
    assert again.cfg == ladder.cfg
    for name, tensor in ladder.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_padded_vocabulary_moves_without_its_padding() -> None:
    gpt = random_gpt(vocab_size=4100, n_layer=1)
    assert gpt.lm_head.weight.shape[0] > 4100
    ladder = from_fastgpt2(gpt)
    assert ladder.out_head.weight.shape[0] == 4100
    idx = tokens(1, 5)
    torch.testing.assert_close(to_fastgpt2(ladder).logits(idx), ladder(idx))


def test_the_models_share_no_memory() -> None:
    gpt, idx = random_gpt(), tokens(1, 5)
    ladder = from_fastgpt2(gpt)
    expected = gpt.logits(idx)
    for parameter in ladder.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(gpt.logits(idx), expected)


def test_openais_arrays_load() -> None:
    gpt = GPT.from_pretrained(str(GOLDEN)).eval().double()
    config = gpt.config
    cfg = SMALL | {
        "vocab_size": config.vocab_size,
        "context_length": config.block_size,
        "emb_dim": config.n_embd,
        "n_heads": config.n_head,
        "n_layers": config.n_layer,
    }
    params = openai_params(gpt)
    arrays = {
        key: [as_arrays(block) for block in value] if key == "blocks" else value.numpy()
        for key, value in params.items()
    }
    ladder = GPTModel(cfg).eval().double()
    load_weights_into_gpt(ladder, arrays)
    idx = torch.arange(6)[None] % config.vocab_size
    torch.testing.assert_close(ladder(idx), gpt.logits(idx))


def as_arrays(tree: dict[str, Any]) -> dict[str, Any]:
    return {k: as_arrays(v) if isinstance(v, dict) else v.numpy() for k, v in tree.items()}


def test_an_untied_head_is_not_thrown_away() -> None:
    with pytest.raises(UserError, match="out_head differs from tok_emb"):
        to_fastgpt2(model())


def test_dropout_rates_are_not_thrown_away() -> None:
    with pytest.raises(UserError, match=r"one drop_rate, the model has \[0.1, 0.3\]"):
        from_fastgpt2(random_gpt(dropout=0.1, attn_dropout=0.3))


def test_mistakes_leave_the_model_as_it_was() -> None:
    params = openai_params(random_gpt())
    ladder = model()
    before = {name: tensor.clone() for name, tensor in ladder.state_dict().items()}
    del params["blocks"][1]["mlp"]["c_fc"]["b"]
    with pytest.raises(UserError, match=r"the parameters lack blocks\[1\]/mlp/c_fc/b"):
        load_weights_into_gpt(ladder, params)
    params = openai_params(random_gpt(n_embd=27))
    with pytest.raises(UserError, match=r"tok_emb.weight must have shape \(97, 24\), .*\(97, 27\)"):
        load_weights_into_gpt(ladder, params)
    with pytest.raises(UserError, match="the parameters have 3 blocks, the model has 2"):
        load_weights_into_gpt(ladder, openai_params(random_gpt(n_layer=3)))
    with pytest.raises(UserError, match="use qkv_bias=True"):
        load_weights_into_gpt(model(qkv_bias=False), openai_params(random_gpt()))
    for name, tensor in ladder.state_dict().items():
        assert torch.equal(tensor, before[name])
