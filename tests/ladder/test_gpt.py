import pytest
import torch

from fastgpt2.errors import UserError
from fastgpt2.ladder import (
    GPT_CONFIG_124M,
    DummyGPTModel,
    GPTModel,
    TokenEmbedder,
    TransformerBlock,
)
from tests.ladder import published
from tests.ladder.tiny import SMALL, model, tokens


def test_the_dummy_has_the_shapes_of_the_model() -> None:
    idx = tokens(2, 9)
    assert DummyGPTModel(SMALL)(idx).shape == GPTModel(SMALL)(idx).shape == (2, 9, 97)


def test_a_model_whose_blocks_add_nothing_is_the_dummy() -> None:
    gpt, idx = model(), tokens(2, 9)
    for block in gpt.trf_blocks:
        assert isinstance(block, TransformerBlock)
        for last in (block.att.out_proj, block.ff.layers[2]):
            for parameter in last.parameters():
                torch.nn.init.zeros_(parameter)
    gpt.final_norm = torch.nn.Identity()
    dummy = DummyGPTModel(SMALL)
    dummy.load_state_dict(gpt.state_dict(), strict=False)
    assert torch.equal(dummy(idx), gpt(idx))


def test_the_model_begins_with_the_token_embedder() -> None:
    gpt, idx = model(), tokens(2, 9)
    embed = TokenEmbedder(SMALL["vocab_size"], SMALL["emb_dim"], SMALL["context_length"])
    embed.load_state_dict({k: v for k, v in gpt.state_dict().items() if "_emb." in k})
    seen: list[torch.Tensor] = []
    gpt.trf_blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    gpt(idx)
    assert torch.equal(seen[0], embed(idx))


def test_state_dict_names() -> None:
    parts = "W_query.weight W_query.bias W_key.weight W_key.bias W_value.weight W_value.bias"
    block = {f"att.{name}" for name in [*parts.split(), "out_proj.weight", "out_proj.bias", "mask"]}
    block |= {f"ff.layers.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    block |= {f"norm{i}.{kind}" for i in (1, 2) for kind in ("scale", "shift")}
    names = {f"trf_blocks.{i}.{name}" for i in range(2) for name in block}
    names |= {"tok_emb.weight", "pos_emb.weight", "out_head.weight"}
    names |= {"final_norm.scale", "final_norm.shift"}
    assert set(GPTModel(SMALL).state_dict()) == names


def test_a_checkpoint_with_masks_of_floats_loads() -> None:
    gpt = model()
    state = {k: v.float() if k.endswith("mask") else v for k, v in gpt.state_dict().items()}
    other = model(seed=1)
    other.load_state_dict(state)
    idx = tokens(1, 16)
    assert torch.equal(other(idx), gpt(idx))


def test_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        gpt = GPTModel(GPT_CONFIG_124M)
    assert sum(p.numel() for p in gpt.parameters()) == published.PARAMETERS_124M


def test_mistakes() -> None:
    with pytest.raises(UserError, match="GPTModel: the configuration lacks n_heads, qkv_bias"):
        GPTModel({k: v for k, v in SMALL.items() if k not in ("n_heads", "qkv_bias")})
    with pytest.raises(UserError, match="17 tokens, but context_length is 16"):
        model()(tokens(1, 17))
