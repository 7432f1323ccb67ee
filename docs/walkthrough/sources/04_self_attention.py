# %% [markdown]
# # Self-attention
#
# Each token has to gather from the others what it needs. Attention makes it an average of all
# tokens, weighted by how well they fit. Five rungs lead from dot products to the form GPT uses.
# ([`self_attention.py`](../../fastgpt2/ladder/self_attention.py))
#
# **Rung one: nothing is learned.** The fit of two tokens is their dot product, a softmax makes the
# fits of one token positive with sum 1, and these weigh the average: `softmax(x xᵀ) x`.

# %%
import torch

from fastgpt2.ladder import simple_attention

torch.manual_seed(1)
words = ["the", "cat", "saw", "the", "dog"]
table = {word: torch.randn(8) for word in ["the", "cat", "saw", "dog"]}
x = torch.stack([table[word] for word in words])
print(tuple(simple_attention(x).shape))

# %% [markdown]
# **Rung two: what is compared is learned.** Three matrices make of each token a query (what it
# looks for), a key (what it can be found by) and a value (what it hands over):
# `softmax(q kᵀ / √D) v`. The division keeps the scores at variance 1 whatever the width D; without
# it the softmax of a wide head is nearly 0 and 1, where gradients vanish.

# %%
q, k = torch.randn(2, 10_000, 64)
scores = (q * k).sum(-1)
print(f"standard deviation of q·k: {scores.std():.2f}, of q·k/√64: {scores.div(8).std():.2f}")

# %% [markdown]
# With the right weights, `SelfAttentionV1` is the rung before: keys and values are the tokens
# themselves, and the queries undo the division.

# %%
from fastgpt2.ladder import SelfAttentionV1
from fastgpt2.ladder.same_weights import simple_to_v1

v1 = simple_to_v1(8)
print("largest difference:", (v1(x) - simple_attention(x)).abs().max().item())

# %% [markdown]
# **Rung three: linear layers.** `SelfAttentionV2` has `nn.Linear` in place of the bare matrices. It
# stores the transpose, and starts from smaller numbers. Same weights, same result:

# %%
from fastgpt2.ladder.same_weights import v1_to_v2

torch.manual_seed(2)
v1 = SelfAttentionV1(8, 8)
v2 = v1_to_v2(v1)
print("largest difference:", (v2(x) - v1(x)).abs().max().item())

# %% [markdown]
# **Rung four: no look ahead.** A model that is to guess the next token must not see it. Scores of
# later tokens become −∞ before the softmax, so that their weights are 0 and the others add up to 1
# by themselves. Row t is then what the rung before says of the last token of the first t + 1:

# %%
from fastgpt2.ladder.same_weights import v2_to_causal

causal = v2_to_causal(v2, context_length=5)
out = causal(x)
for t in range(5):
    print(words[: t + 1], (out[t] - v2(x[: t + 1])[-1]).abs().max().item())

# %% [markdown]
# The weights of the three, each row one token's view. In the first, the two `the` see the same,
# since nothing says where a token stands. (Weights that were not learned mean nothing; those of a
# trained model come later in the walkthrough.)

# %%
import matplotlib.pyplot as plt

from fastgpt2.ladder import SelfAttentionV2, attention_weights

torch.manual_seed(5)
fresh = SelfAttentionV2(8, 8)
# fresh weights are small: twice as large, they say more
q, k = 2 * fresh.W_query(x), 2 * fresh.W_key(x)
maps = {
    "dot products": torch.softmax(x @ x.T, dim=-1),
    "queries and keys": attention_weights(q, k),
    "causal": attention_weights(q, k, hidden=causal.mask),
}
figure, panels = plt.subplots(1, 3, figsize=(9.6, 3.4), num="weights", layout="constrained")
for axes, (name, weights) in zip(panels, maps.items(), strict=True):
    image = axes.imshow(weights.detach(), vmin=0, vmax=1)
    axes.set(title=name, xticks=range(5), yticks=range(5), xlabel="key")
    axes.set_xticklabels(words)
    axes.set_yticklabels(words)
    axes.grid(False)
    for row in range(5):
        for column in range(5):
            weight = weights[row, column].item()
            shade = "black" if weight > 0.6 else "white"
            axes.text(column, row, f"{weight:.2f}", ha="center", va="center", color=shade, size=8)
panels[0].set_ylabel("query")
figure.colorbar(image, ax=panels, label="weight", shrink=0.8)

# %% [markdown]
# **Rung five: dropout.** While training, `CausalAttention` sets a part of the weights to 0 and
# scales the rest up by 1 / (1 − p), so that no token relies on a single other one. The sum of a row
# is 1 on average only.

# %%
from fastgpt2.ladder import CausalAttention

torch.manual_seed(3)
dropped = CausalAttention(8, 8, context_length=5, dropout=0.5).dropout(maps["causal"].detach())
print(dropped)
print("row sums:", dropped.sum(-1).tolist())
