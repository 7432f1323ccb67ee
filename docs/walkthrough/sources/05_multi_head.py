# %% [markdown]
# # Several heads
#
# One softmax gives one view. Several heads look for different things at once: each has its own
# query, key and value, and their results stand side by side.
# ([`multi_head.py`](../../fastgpt2/ladder/multi_head.py))
#
# `MultiHeadAttentionWrapper` is the idea in its plainest form: a list of causal attentions.

# %%
import torch

from fastgpt2.ladder import MultiHeadAttentionWrapper

torch.manual_seed(0)
x = torch.randn(2, 7, 24)
wrapper = MultiHeadAttentionWrapper(24, 8, context_length=7, dropout=0.0, num_heads=3)
print(tuple(wrapper(x).shape), "= 3 heads of 8")
print("one after the other:", torch.equal(wrapper(x)[..., 8:16], wrapper.heads[1](x)))

# %% [markdown]
# Three small matrix products in turn leave a fast machine idle. `MultiHeadAttention` does one large
# product and cuts its result into heads by a change of shape:
#
# ```text
# (B, T, d_in)     the tokens
# (B, T, d_out)    W_query(x), all heads in one product; the same for keys and values
# (B, T, H, D)     the last dimension seen as H heads of D = d_out / H
# (B, H, T, D)     heads moved to the front, so that they are batched like sequences
# (B, H, T, T)     weights of each head
# (B, T, d_out)    results side by side again
# (B, T, d_out)    out_proj: the heads are mixed
# ```
#
# With the heads' matrices stacked and an output projection that changes nothing, the numbers are
# the same:

# %%
from fastgpt2.ladder.same_weights import wrapper_to_multi_head

multi_head = wrapper_to_multi_head(wrapper)
print(
    tuple(multi_head.W_query.weight.shape),
    "from three of",
    tuple(wrapper.heads[0].W_query.weight.shape),
)
print("largest difference:", (multi_head(x) - wrapper(x)).abs().max().item())

# %% [markdown]
# `weights` shows who attends to whom, one map a head; each row adds up to 1.

# %%
weights = multi_head.weights(x)
print(
    tuple(weights.shape),
    "row sums",
    weights.sum(-1).min().item(),
    "to",
    weights.sum(-1).max().item(),
)
