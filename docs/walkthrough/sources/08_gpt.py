# %% [markdown]
# # GPT
#
# The model is short now: token and position embeddings, a stack of blocks, a last LayerNorm, and a
# linear head that turns each vector into one score (logit) for each token of the vocabulary.
# ([`gpt.py`](../../fastgpt2/ladder/gpt.py))
#
# `DummyGPTModel` has placeholders for blocks and norm, which do nothing. Its shapes are already
# those of GPT.

# %%
import torch

from fastgpt2.ladder import GPT_CONFIG_124M, DummyGPTModel, GPTModel

cfg = GPT_CONFIG_124M | {
    "vocab_size": 300,
    "context_length": 32,
    "emb_dim": 48,
    "n_heads": 4,
    "n_layers": 3,
}
torch.manual_seed(0)
idx = torch.randint(300, (2, 8))
print("ids", tuple(idx.shape), "-> logits", tuple(DummyGPTModel(cfg)(idx).shape))

# %% [markdown]
# `GPTModel` is the dummy with its placeholders filled. Silence the branches of its blocks, take its
# last norm away, and the dummy is back:

# %%
gpt, dummy = GPTModel(cfg).eval(), DummyGPTModel(cfg).eval()
dummy.load_state_dict(gpt.state_dict(), strict=False)
print("blocks at work:", torch.allclose(gpt(idx), dummy(idx)))
for block in gpt.trf_blocks:
    for last in (block.att.out_proj, block.ff.layers[2]):
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
gpt.final_norm = torch.nn.Identity()
print("blocks silent: ", torch.equal(gpt(idx), dummy(idx)))

# %% [markdown]
# GPT-2's sizes, without spending memory on them (on the "meta" device tensors have only shapes).
# "124M" counts the head once with the token embedding, as OpenAI ties them; with a head of its own
# the smallest GPT-2 has 163 million parameters.

# %%
sizes = {
    "GPT-2 small": (768, 12, 12),
    "medium": (1024, 24, 16),
    "large": (1280, 36, 20),
    "XL": (1600, 48, 25),
}
print("| model | width | layers | heads | parameters | with a tied head |")
print("|---|---:|---:|---:|---:|---:|")
for name, (width, layers, heads) in sizes.items():
    shape = {"emb_dim": width, "n_layers": layers, "n_heads": heads, "qkv_bias": True}
    with torch.device("meta"):
        model = GPTModel(GPT_CONFIG_124M | shape)
    count = sum(p.numel() for p in model.parameters())
    tied = count - model.out_head.weight.numel()
    print(f"| {name} | {width} | {layers} | {heads} | {count:,} | {tied:,} |")

# %% [markdown]
# `generate_text_simple` asks for the likeliest next token, appends it, and asks again. It reads the
# logits of the last position only. An untrained model has nothing to say, and says it over and
# over:

# %%
from fastgpt2.ladder import generate_text_simple

torch.manual_seed(0)
gpt = GPTModel(cfg).eval()
print(generate_text_simple(gpt, idx[:1], max_new_tokens=12, context_size=32).tolist())
