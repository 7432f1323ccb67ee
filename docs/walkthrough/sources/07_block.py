# %% [markdown]
# # The transformer block
#
# Attention moves information between tokens. A block adds what makes a deep stack of it trainable:
# LayerNorm, a feed-forward network, and shortcuts.
# ([`block.py`](../../fastgpt2/ladder/block.py))
#
# **LayerNorm** gives each token mean 0 and variance 1, then a learned scale and shift. The
# package's own op computes the same.

# %%
import torch

from fastgpt2.kernels import layer_norm
from fastgpt2.ladder import LayerNorm

torch.manual_seed(0)
norm = LayerNorm(8)
x = 5 + 3 * torch.randn(2, 8)
y = norm(x)
print("before: mean", x.mean(-1).tolist(), "variance", x.var(-1, correction=0).tolist())
print(
    "after:  mean",
    [f"{m:.1e}" for m in y.mean(-1).tolist()],
    "variance",
    y.var(-1, correction=0).tolist(),
)
print("as the package's op:", torch.allclose(y, layer_norm(x, norm.scale, norm.shift)))

# %% [markdown]
# **GELU** is a smooth ReLU: small negative inputs let a little through, so their units go on
# learning. GPT-2 uses the form with a tanh, which is within a thousandth of the exact one.

# %%
import matplotlib.pyplot as plt

from fastgpt2.ladder import GELU

z = torch.linspace(-4, 4, 400, requires_grad=True)
activations = {"ReLU": torch.relu, "GELU (tanh)": GELU()}
figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 2.8), num="gelu", layout="constrained")
for (name, f), color in zip(activations.items(), ("#b0b0b0", "#0072b2"), strict=True):
    (slope,) = torch.autograd.grad(f(z).sum(), z)
    left.plot(z.detach(), f(z).detach(), label=name, color=color)
    right.plot(z.detach(), slope, label=name, color=color)
left.set(title="ReLU and GELU", xlabel="x", ylabel="y", ylim=(-0.5, 3))
right.set(title="Their derivatives", xlabel="x", ylabel="dy/dx")
left.legend()
exact = torch.nn.functional.gelu(z)
print(f"largest distance from the exact GELU: {(GELU()(z) - exact).abs().max().item():.1e}")

# %% [markdown]
# **FeedForward** works on each token alone: four times as wide inside, then back. Two thirds of a
# block's parameters are here.
#
# ## Why shortcuts
#
# In a deep network the gradient reaches the first layers through all the others, and each of them
# shrinks it. A shortcut adds a layer's input to its output, y = x + f(x), and the gradient has a
# path that no layer touches.

# %% parameters
DEPTH = 24
NETWORKS = 20

# %%
from fastgpt2.ladder import DeepNetwork, mean_gradients

torch.manual_seed(0)
sizes = [64] * (DEPTH + 1)
x = torch.randn(16, 64)
figure, axes = plt.subplots(figsize=(6, 3.4), num="gradient-flow", layout="constrained")
for use_shortcut, color, label in (
    (False, "#d55e00", "without shortcuts"),
    (True, "#0072b2", "with shortcuts"),
):
    runs = torch.tensor(
        [mean_gradients(DeepNetwork(sizes, use_shortcut), x) for _ in range(NETWORKS)]
    )
    layers = range(1, DEPTH + 1)
    low, middle, high = runs.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=0)
    axes.semilogy(layers, middle, color=color, label=label)
    axes.fill_between(layers, low, high, color=color, alpha=0.2, lw=0)
    print(f"{label:18} first layer {middle[0]:.1e}, last {middle[-1]:.1e}")
axes.set(xlabel="layer", ylabel="mean |gradient| of its weights",
         title=f"Gradients in {NETWORKS} deep networks: median, 10% to 90%")  # fmt: skip
axes.legend()

# %% [markdown]
# What counts is the slope of the lines, not their height: with shortcuts the first layer hears as
# much as the last, without them next to nothing.
#
# **TransformerBlock** is `x + attention(norm1(x))`, then `x + feed_forward(norm2(x))`. What flows
# along the shortcuts, the residual stream, is only ever added to: a block whose two branches end in
# zeros leaves it as it is.

# %%
from fastgpt2.ladder import TransformerBlock

cfg = {"emb_dim": 64, "context_length": 16, "n_heads": 4, "drop_rate": 0.0, "qkv_bias": False}
block = TransformerBlock(cfg)
x = torch.randn(1, 16, 64)
print("in", tuple(x.shape), "out", tuple(block(x).shape))
for last in (block.att.out_proj, block.ff.layers[2]):
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
print("silent branches:", torch.equal(block(x), x))
counts = {name: sum(p.numel() for p in part.parameters()) for name, part in block.named_children()}
print({name: count for name, count in counts.items() if count})
