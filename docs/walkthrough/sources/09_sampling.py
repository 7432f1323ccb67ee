# %% [markdown]
# # Temperature and top-k
#
# The likeliest token each time gives dull texts that go in circles. Drawing from the distribution
# gives varied ones, and now and then a very unlikely token that spoils the rest. Two knobs lie
# between. ([`sampling.py`](../../fastgpt2/ladder/sampling.py))
#
# The logits here are made up, for nine words after "Every effort moves you".

# %%
import torch

from fastgpt2.ladder import next_token_probabilities

words = ["forward", "toward", "closer", "onward", "ahead", "further", "inches", "away", "pizza"]
logits = torch.tensor([6.75, 6.28, 4.51, 4.2, 3.9, 3.1, 1.9, 0.4, -1.6])

# %% [markdown]
# **Temperature** divides the logits before the softmax. Below 1 the largest gains, at 0 it takes
# all; above 1 the others gain, until all are alike.

# %%
import matplotlib.pyplot as plt

temperatures = [0.1, 1.0, 5.0]
colors = ["#0072b2", "#56b4e9", "#e69f00"]
figure, axes = plt.subplots(figsize=(7.4, 3.2), num="temperature", layout="constrained")
for i, (temperature, color) in enumerate(zip(temperatures, colors, strict=True)):
    probabilities = next_token_probabilities(logits, temperature)
    places = [place + 0.27 * (i - 1) for place in range(9)]
    axes.bar(
        places, probabilities.tolist(), width=0.26, color=color, label=f"temperature {temperature}"
    )
    entropy = -torch.special.xlogy(probabilities, probabilities).sum()
    print(f"temperature {temperature}: entropy {entropy:.2f} nats, pizza {probabilities[-1]:.1e}")
axes.set_xticks(range(9), words)
axes.set(ylabel="probability", title="A high temperature levels the distribution")
axes.grid(axis="x", visible=False)
axes.legend()

# %% [markdown]
# The entropy tells the whole story: from 0, where one token is certain, to log 9, where all nine
# are equally likely.

# %%
import math

figure, axes = plt.subplots(figsize=(5.4, 3.0), num="entropy", layout="constrained")
grid = torch.logspace(-1.3, 2, 120)
p = torch.stack([next_token_probabilities(logits, t.item()) for t in grid])
axes.semilogx(grid, -torch.special.xlogy(p, p).sum(-1), color="#0072b2")
axes.axhline(math.log(9), color="#999999", ls="--", lw=1)
axes.text(grid[0], math.log(9) - 0.05, "log 9: all alike", va="top", size=8, color="#666666")
axes.axvline(1, color="#cccccc", lw=1)
axes.text(1.08, 0.06, "temperature 1: the model's own", size=8, color="#666666")
axes.set(xlabel="temperature", ylabel="nats", ylim=(0, 2.4), title="Entropy of the distribution")

# %% [markdown]
# **Top-k** keeps the k largest logits and gives the rest probability 0: no pizza at any
# temperature.

# %%
for k in (None, 3):
    torch.manual_seed(0)
    drawn = torch.multinomial(
        next_token_probabilities(logits, 5.0, top_k=k), 1000, replacement=True
    )
    counts = torch.bincount(drawn, minlength=9).tolist()
    print(
        f"top_k {k!s:>4}:", ", ".join(f"{n} {w}" for w, n in zip(words, counts, strict=True) if n)
    )

# %% [markdown]
# `generate` does this at every step. At temperature 0 it is `generate_text_simple`; with `eos_id`
# it stops at the end of the text.

# %%
from fastgpt2.ladder import GPTModel, generate, generate_text_simple

torch.manual_seed(0)
cfg = {"vocab_size": 50, "context_length": 16, "emb_dim": 32, "n_heads": 2, "n_layers": 2,
       "drop_rate": 0.0, "qkv_bias": False}  # fmt: skip
model = GPTModel(cfg).eval()
idx = torch.tensor([[1, 2, 3]])
print(torch.equal(generate(model, idx, 10, 16), generate_text_simple(model, idx, 10, 16)))
for _ in range(3):
    print(generate(model, idx, 10, 16, temperature=1.0, top_k=10).tolist())
