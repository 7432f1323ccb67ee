# %% [markdown]
# # OpenAI's weights, and the package's model
#
# OpenAI released GPT-2 as nested parameters with names of their own, matrices transposed, q, k and
# v side by side in one of them. `load_weights_into_gpt` sorts them into the ladder's model.
# ([`released_weights.py`](../../fastgpt2/ladder/released_weights.py))
#
# The weights here are random, in GPT-2's form; the real ones come with
# `GPT.from_pretrained("gpt2")`, or a folder you have, and the same lines.

# %%
import torch

from fastgpt2 import GPT, GPTConfig
from fastgpt2.ladder import (
    GPTModel,
    from_fastgpt2,
    load_weights_into_gpt,
    openai_params,
    to_fastgpt2,
)

torch.manual_seed(0)
gpt = GPT(GPTConfig(vocab_size=300, block_size=32, n_embd=48, n_head=4, n_layer=2)).eval()
params = openai_params(gpt)
print(list(params), list(params["blocks"][0]))
print("c_attn/w", tuple(params["blocks"][0]["attn"]["c_attn"]["w"].shape), "is (in, 3 out)")

# %% [markdown]
# The model needs biases on its three projections (`qkv_bias=True`), as GPT-2 has them. Its head
# becomes a copy of the token embedding. Then the ladder's model, built from dot products, and
# `fastgpt2.GPT`, built from fused kernels, say the same:

# %%
cfg = {"vocab_size": 300, "context_length": 32, "emb_dim": 48, "n_heads": 4, "n_layers": 2,
       "drop_rate": 0.0, "qkv_bias": True}  # fmt: skip
model = GPTModel(cfg).eval()
load_weights_into_gpt(model, params)
idx = torch.randint(300, (2, 32))
with torch.no_grad():
    difference = (model(idx) - gpt.logits(idx)).abs().max().item()
print(f"largest difference of the logits: {difference:.1e}")

# %% [markdown]
# `from_fastgpt2` does both steps, configuration included, and `to_fastgpt2` goes the other way.
# There and back, no bit changes:

# %%
back = to_fastgpt2(from_fastgpt2(gpt))
same = [
    torch.equal(a, b)
    for a, b in zip(gpt.state_dict().values(), back.state_dict().values(), strict=True)
]
print(all(same), "for", len(same), "tensors")

# %% [markdown]
# GPT-2's head *is* its token embedding. A ladder model trained with a head of its own cannot become
# a GPT-2 without losing one of the two matrices, and is told so rather than cut:

# %%
from fastgpt2 import UserError

try:
    to_fastgpt2(GPTModel(cfg))
except UserError as error:
    print(error)
