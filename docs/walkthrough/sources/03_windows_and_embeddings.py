# %% [markdown]
# # Windows and embeddings
#
# A language model learns to say which token comes next. The training pairs are cut from the tokens
# by a window: its tokens are the inputs, the same window moved on by one holds the targets. A
# window of T tokens asks T questions at once, one for each prefix.
# ([`windows.py`](../../fastgpt2/ladder/windows.py),
# [`embeddings.py`](../../fastgpt2/ladder/embeddings.py))

# %%
from fastgpt2.ladder import BytePairEncoder, GPTDatasetV1

text = "she sells sea shells by the sea shore; the shells she sells are sea shells, surely."
tokenizer = BytePairEncoder.train(text, 275)
windows = GPTDatasetV1(text, tokenizer, max_length=6, stride=6)


def show(ids):
    return "".join(f"[{tokenizer.decode([i])}]" for i in ids)


for inputs, targets in list(windows)[:3]:
    print(f"{show(inputs):40} -> {show(targets)}")

inputs, targets = windows[0]
print()
for t in range(6):
    print(f"{show(inputs[: t + 1]):40} -> {show(targets[t : t + 1])}")

# %% [markdown]
# `stride` is how far the window moves. A stride of T uses every token once as a target; a smaller
# one gives more windows that overlap. `create_dataloader` cuts the same windows on demand, shuffles
# them and stacks them into batches.

# %%
from fastgpt2.ladder import create_dataloader

ids = tokenizer.encode(text)
for stride in (6, 3, 1):
    loader = create_dataloader(ids, batch_size=2, max_length=6, stride=stride, shuffle=False)
    inputs, targets = next(iter(loader))
    print(f"stride {stride}: {len(loader.dataset)} windows, batches of {tuple(inputs.shape)}")

# %% [markdown]
# An id says nothing: 261 is not more than 260. An embedding gives each token a vector that is
# learned. It is a table, and looking up row `id` is the same as multiplying the table with a vector
# that is 1 at `id` and 0 elsewhere.

# %%
import torch

from fastgpt2.ladder import TokenEmbedder

torch.manual_seed(0)
embed = TokenEmbedder(vocab_size=tokenizer.vocab_size, emb_dim=4, context_length=6)
one_hot = torch.nn.functional.one_hot(inputs, tokenizer.vocab_size).float()
print(torch.equal(one_hot @ embed.tok_emb.weight, embed.tok_emb(inputs)))

# %% [markdown]
# Attention, the next rung, looks at a set of vectors and cannot tell their order. So a second
# table holds a vector for each position, and the sum of both is what the model works with. The same
# token at two places is now two different vectors.

# %%
twice = torch.tensor([[ids[0], ids[1], ids[0]]])
x = embed(twice)
print(tuple(x.shape))
print(x[0, 0].tolist() == x[0, 2].tolist())
print(torch.equal(x[0, 2], embed.tok_emb.weight[ids[0]] + embed.pos_emb.weight[2]))
