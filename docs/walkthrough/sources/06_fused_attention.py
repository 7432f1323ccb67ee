# %% [markdown]
# # The same numbers, faster
#
# Three more rungs change nothing about the result.
# ([`fused_attention.py`](../../fastgpt2/ladder/fused_attention.py))
#
# - `PackedMultiHeadAttention`: queries, keys and values from one product with a matrix three times
#   as tall, so the tokens are read once.
# - `SDPAMultiHeadAttention`: PyTorch's `scaled_dot_product_attention`, a fused kernel.
# - `KernelMultiHeadAttention`: this package's op, which takes q, k and v from where the packed
#   projection left them; Triton on a GPU, PyTorch's operators elsewhere.
#
# All nine attentions of the ladder, those with weights all with the same ones
# ([`same_weights.py`](../../fastgpt2/ladder/same_weights.py) carries them from rung to rung). This
# table, on any machine: `python -m fastgpt2.ladder`. Where the last column is empty another
# function begins, to which the next rungs are compared: with weights, with the mask, with the
# weights cut into heads.

# %% parameters
REPEATS = 10
CONTEXTS = [64, 128, 256, 512, 1024]

# %%
import torch

from fastgpt2.ladder import attention_rungs, simple_attention
from fastgpt2.ladder.same_weights import format_timings, time_rungs

torch.manual_seed(0)
B, T, C, H = 2, 256, 256, 4
rungs = [simple_attention, *attention_rungs(C, context_length=T, num_heads=H)]
print(format_timings(time_rungs(rungs, torch.randn(B, T, C), REPEATS)))

# %% [markdown]
# The times above are from one CPU, shared with other work when the page was made: read the order,
# not the digits. From `MultiHeadAttention` on each rung has one matrix product more than the
# wrapper, the output projection. What one large product gains over several small ones shows on a
# GPU, whose thousands of units small ones leave idle; two cores are busy either way.
#
# ## What fusing saves
#
# The plain form writes all T × T weights of every head to memory, and backward needs them again.
# FlashAttention (Dao et al., 2022) never does. It walks over the keys in tiles, keeps for each
# query the largest score m, the sum of exp(score − m) and the values weighted so far, and
# rescales the latter two whenever m grows. Tiles beyond the diagonal are skipped, only those the
# diagonal crosses need the mask.

# %%
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

TILES = 6
figure, axes = plt.subplots(figsize=(6.6, 5.0), num="tiling", layout="constrained")
colors = {"full": "#0072b2", "diagonal": "#9ecae1", "skipped": "#f0f0f0", "now": "#d55e00"}
row = 3
for m in range(TILES):
    for n in range(TILES):
        kind = "full" if n < m else "diagonal" if n == m else "skipped"
        color = "now" if (m, n) == (row, 1) else kind
        axes.add_patch(Rectangle((n, m), 0.94, 0.94, color=colors[color], lw=0))
        if n == m:
            corner = [(n, m), (n + 0.94, m), (n + 0.94, m + 0.94)]
            axes.add_patch(plt.Polygon(corner, color=colors["skipped"], lw=0))
for m in range(TILES):
    axes.add_patch(
        Rectangle((-1.35, m), 0.8, 0.94, color="#009e73", alpha=1.0 if m == row else 0.25, lw=0)
    )
    axes.add_patch(
        Rectangle(
            (TILES + 0.45, m), 0.8, 0.94, color="#cc79a7", alpha=1.0 if m == row else 0.25, lw=0
        )
    )
    axes.add_patch(
        Rectangle((m, -1.35), 0.94, 0.8, color="#555555", alpha=1.0 if m == 1 else 0.25, lw=0)
    )
axes.text(-0.95, row + 0.47, "Q", ha="center", va="center", color="white", weight="bold")
axes.text(TILES + 0.85, row + 0.47, "O", ha="center", va="center", color="white", weight="bold")
axes.text(1.47, -0.95, "K, V", ha="center", va="center", color="white", weight="bold")
axes.text(1.47, row + 0.47, "q kᵀ", ha="center", va="center", color="white", weight="bold")
axes.add_patch(
    FancyArrowPatch(
        (2.05, row + 0.47),
        (3.45, row + 0.47),
        arrowstyle="-|>",
        mutation_scale=14,
        color="white",
        lw=1.6,
    )
)
axes.text(
    -1.5,
    row + 0.47,
    "one program:\na tile of queries\nstays on the chip",
    ha="right",
    va="center",
    size=8,
)
axes.text(
    TILES + 1.35,
    row + 0.47,
    "m, sum and O\nare rescaled\nas m grows",
    ha="left",
    va="center",
    size=8,
)
axes.text(
    TILES / 2, -1.5, "keys and values pass by, a tile at a time", ha="center", va="bottom", size=8
)
axes.legend(
    handles=[
        Patch(color=colors["now"], label="on the chip now"),
        Patch(color=colors["full"], label="no mask needed"),
        Patch(color=colors["diagonal"], label="masked on the diagonal"),
        Patch(color=colors["skipped"], label="the future: never computed"),
    ],
    loc="upper center",
    bbox_to_anchor=(0.5, 0.02),
    ncols=2,
)
axes.set(xlim=(-3.6, TILES + 3.2), ylim=(TILES + 0.1, -2.0), aspect="equal")
axes.axis("off")

# %% [markdown]
# That the running sums give the softmax, in a dozen lines for one head, against the plain form:

# %%
from fastgpt2.ladder import attend
from fastgpt2.ladder.self_attention import future

q, k, v = torch.randn(3, 96, 32, dtype=torch.float64)
tile, out = 16, torch.empty_like(q)
for top in range(0, 96, tile):
    largest = torch.full((tile, 1), -torch.inf, dtype=q.dtype)
    total, acc = torch.zeros(tile, 1, dtype=q.dtype), torch.zeros(tile, 32, dtype=q.dtype)
    for left in range(0, top + tile, tile):
        scores = q[top : top + tile] @ k[left : left + tile].T / 32**0.5
        if left == top:
            scores = scores.masked_fill(future(tile), -torch.inf)
        new_largest = torch.maximum(largest, scores.amax(-1, keepdim=True))
        p, rescale = (scores - new_largest).exp(), (largest - new_largest).exp()
        total, acc = (
            total * rescale + p.sum(-1, keepdim=True),
            acc * rescale + p @ v[left : left + tile],
        )
        largest = new_largest
    out[top : top + tile] = acc / total
print("largest difference:", (out - attend(q, k, v, future(96))).abs().max().item())

# %% [markdown]
# And what it saves, measured: the bytes that autograd keeps from forward until backward, weights
# of the module not counted. The plain form keeps the (H, T, T) weights, 4 H T² bytes in fp32, and
# grows with the square of the context; the fused one keeps q, k, v, the result and one number a
# row.


# %%
def kept_bytes(module, x):
    """Bytes of the distinct tensors that autograd saves in one forward pass."""
    own = {p.untyped_storage().data_ptr() for p in [*module.parameters(), *module.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(size for size, _ in kept.values())


sizes = {"MultiHeadAttention": [], "SDPAMultiHeadAttention": [], "KernelMultiHeadAttention": []}
for T in CONTEXTS:
    for rung in attention_rungs(C, T, H):
        name = type(rung).__name__
        if name in sizes:
            sizes[name].append(kept_bytes(rung, torch.randn(1, T, C)) / 2**20)
print(f"{'MiB kept':24}", *(f"T={T:<6}" for T in CONTEXTS))
for name, row_of_sizes in sizes.items():
    print(f"{name:24}", *(f"{size:<8.2f}" for size in row_of_sizes))

# %%
figure, axes = plt.subplots(figsize=(5.8, 3.6), num="memory", layout="constrained")
styles = [
    ("o", "#d55e00", "plain"),
    ("s", "#0072b2", "fused (SDPA)"),
    ("x", "#333333", "fused (our op)"),
]
for row_of_sizes, (marker, color, label) in zip(sizes.values(), styles, strict=True):
    axes.loglog(CONTEXTS, row_of_sizes, marker, color=color, label=f"{label}, measured", base=2)
linear = [4 * 5 * T * C / 2**20 for T in CONTEXTS]
both = [4 * H * T * T / 2**20 + s for T, s in zip(CONTEXTS, linear, strict=True)]
for formula, color, label in (
    (both, "#d55e00", "4 H T² + 4 · 5 T C: the weights too"),
    (linear, "#0072b2", "4 · 5 T C: x, q, k, v and the result"),
):
    axes.loglog(CONTEXTS, formula, "--", color=color, lw=1, label=label, base=2)
axes.set(
    xlabel="T, tokens",
    ylabel="MiB",
    title="Memory kept for the backward pass (one sequence, C = 256, H = 4, fp32)",
)
axes.set_xticks(CONTEXTS, [str(T) for T in CONTEXTS])
axes.yaxis.set_major_formatter("{x:g}")
axes.legend(fontsize=8)
