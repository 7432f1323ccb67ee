# %% [markdown]
# # What heads learn
#
# Attention maps of a trained model are best looked at on a task whose solution can be checked. Here
# a few letters, all different, are repeated over and over. How many differs from sequence to
# sequence, so no fixed distance will do: the model has to find the present letter earlier in the
# sequence, and to read what came after it. That takes two layers: a token knows nothing of its
# neighbours until a first layer has told it.

# %% parameters
STEPS = 600

# %%
import torch
import torch.nn.functional as F

from fastgpt2.ladder import GPTModel

torch.manual_seed(0)
V, T = 26, 32
cfg = {"vocab_size": V, "context_length": T, "emb_dim": 48, "n_heads": 2, "n_layers": 2,
       "drop_rate": 0.0, "qkv_bias": False}  # fmt: skip
model = GPTModel(cfg)
for parameter in model.parameters():
    if parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=0.1)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1)


def repeat(size, period, start=0):
    """Random letters; from place ``start`` on, the first ``period`` of them over and over."""
    places = torch.arange(T)
    source = torch.where(places < start, places, start + (places - start) % period)
    return torch.rand(size, V).argsort(1).gather(1, source.expand(size, T))


losses = []
for _ in range(STEPS):
    period = torch.randint(4, T // 2 + 1, (32, 1))
    idx, knowable = repeat(32, period), torch.arange(T - 1) >= period
    loss = F.cross_entropy(model(idx[:, :-1])[knowable], idx[:, 1:][knowable])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
model.eval()
print(
    f"loss where the letter can be known: {losses[0]:.2f} nats at first, {losses[-1]:.3f} at last"
)

# %%
import math

import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(5.6, 2.8), num="loss", layout="constrained")
axes.plot(losses, color="#b8cfe0", lw=0.8, label="each step")
width = min(25, STEPS)
smooth = torch.tensor(losses).unfold(0, width, 1).mean(-1)
middle = [step + (width - 1) / 2 for step in range(len(smooth))]
axes.plot(middle, smooth, color="#0072b2", label=f"mean of {width}")
axes.axhline(math.log(V), color="#999999", lw=1, ls=":")
axes.text(STEPS, math.log(V), "guessing", ha="right", va="bottom", size=8, color="#666666")
axes.set(xlabel="step", ylabel="nats a token", ylim=(0, None), title="Loss on the repetitions")
axes.legend(loc="center right")

# %% [markdown]
# All four heads on one sequence of 11 letters, repeated. Rows are queries, columns keys.

# %%
letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
torch.manual_seed(4)
PERIOD = 11
idx = torch.randperm(V)[:PERIOD].repeat(3)[None, :T]
inputs = []
hooks = [
    block.att.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    for block in model.trf_blocks
]
with torch.no_grad():
    logits = model(idx)
    maps = [block.att.weights(x)[0] for block, x in zip(model.trf_blocks, inputs, strict=True)]
for hook in hooks:
    hook.remove()
names = [letters[i] for i in idx[0].tolist()]
figure, panels = plt.subplots(2, 2, figsize=(9, 9), num="maps", layout="constrained")
for layer in range(2):
    for head in range(2):
        axes, weights = panels[layer, head], maps[layer][head]
        image = axes.imshow(weights, vmin=0, vmax=1, cmap="Blues")
        axes.set(title=f"Layer {layer + 1}, head {head + 1}", xticks=range(T), yticks=range(T))
        axes.set_xticklabels(names, size=7)
        axes.set_yticklabels(names, size=7)
        for border in range(PERIOD, T, PERIOD):
            axes.axhline(border - 0.5, color="#999999", lw=0.7, ls=":")
            axes.axvline(border - 0.5, color="#999999", lw=0.7, ls=":")
        axes.grid(False)
        axes.spines[:].set_visible(True)
for axes in panels[:, 0]:
    axes.set_ylabel("query")
for axes in panels[1]:
    axes.set_xlabel("key")
figure.colorbar(image, ax=panels, label="weight", shrink=0.6)

# %% [markdown]
# Larger models solve this with a *previous-token head*, which marks each token with the one
# before it, and an *induction head*, which looks for the mark that equals the present token
# (Olsson et al., "In-context Learning and Induction Heads", 2022). The maps say that this small
# one found another way. In layer 1, place t looks at about t/2: with all places of the first half
# spread over the whole sequence, place 2j + 1 has heard of the letters near place j. In layer 2,
# a repetition of letter j looks at about 2j + 1, not at j + 1, where an induction head would
# look.

# %%
query, key = torch.meshgrid(torch.arange(T), torch.arange(T), indexing="ij")
j = query % PERIOD
# repetitions whose 2j + 1 is well apart from their j + 1
apart = (query >= PERIOD) & (j >= 5)
print("| layer | rows | weight within 2 places of | head 1 | head 2 |")
print("|---|---|---|---:|---:|")
for layer, rows, shown, name, place in (
    (0, query >= 0, "all", "t/2", query / 2),
    (1, apart, "repetitions, j ≥ 5", "2j + 1", 2 * j + 1),
    (1, apart, "repetitions, j ≥ 5", "j + 1", j + 1),
):
    near = (key - place).abs() <= 2
    one, two = (maps[layer] * near * rows).sum((1, 2)) / rows[:, 0].sum()
    print(f"| {layer + 1} | {shown} | {name} | {one:.2f} | {two:.2f} |")

# %% [markdown]
# A map shows where a head looks, not what for. If the guess is right, a repetition is understood
# only if its letters first stood in the first half, which is what layer 1 spreads; an induction
# head would not mind. So let four letters repeat from ever later places, and ask for the last
# four:

# %%
torch.manual_seed(5)
for start in (0, 4, 8, 12, 16, 20):
    idx = repeat(500, 4, start)
    with torch.no_grad():
        right = model(idx[:, :-1]).argmax(-1) == idx[:, 1:]
    share = right[:, -4:].float().mean()
    print(f"letters first stand at places {start:2} to {start + 3:2}: {share:.0%} right")
