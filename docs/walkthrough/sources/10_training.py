# %% [markdown]
# # Training
#
# The loss of one token is −log of the probability the model gave it; the mean over all tokens, the
# cross-entropy, is what training lowers. Its exponential, the perplexity, is the number of equally
# likely tokens the model is as unsure as. An untrained model is as unsure as the vocabulary is
# large. ([`training.py`](../../fastgpt2/ladder/training.py))
#
# The run below is the one every reader of chapter 5 of Raschka's book knows, in small: nine tenths
# of a short text to learn from, one tenth to check, batches of two windows, ten epochs. The text is
# the beginning of Python's own help, the tokens are byte pairs learned from it.

# %% parameters
EPOCHS = 10
CHARACTERS = 20_000

# %%
import torch

from fastgpt2.ladder import BytePairEncoder, GPTModel, create_dataloader, train_model_simple
from fastgpt2.text import load_corpus

text = "".join(load_corpus("python-docs").pieces())[:CHARACTERS]
tokenizer = BytePairEncoder.train(text, 400)
cut = int(0.9 * len(text))
train_ids, val_ids = tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:])
print(f"{len(train_ids)} tokens to learn from, {len(val_ids)} to check, of {tokenizer.vocab_size}")

# %%
import math

cfg = {"vocab_size": tokenizer.vocab_size, "context_length": 64, "emb_dim": 96, "n_heads": 4,
       "n_layers": 3, "drop_rate": 0.1, "qkv_bias": False}  # fmt: skip
torch.manual_seed(123)
model = GPTModel(cfg)
train_loader = create_dataloader(train_ids, batch_size=2, max_length=64, stride=64)
val_loader = create_dataloader(val_ids, 2, 64, 64, shuffle=False, drop_last=False)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
nothing = math.log(tokenizer.vocab_size)
print(f"a model that knows nothing: loss log {tokenizer.vocab_size} = {nothing:.2f}")
train_losses, val_losses, tokens_seen = train_model_simple(
    model, train_loader, val_loader, optimizer, "cpu",
    num_epochs=EPOCHS, eval_freq=20, eval_iter=5,
    start_context="The statement", tokenizer=tokenizer,
)  # fmt: skip

# %% [markdown]
# The training loss goes on falling; the validation loss stops, and begins to rise. So small a text
# is soon known by heart, and what is learned by heart does not help with the rest. The samples
# say the same: blanks at first, then words and scraps of the text.

# %%
import matplotlib.pyplot as plt

seen = [tokens / 1000 for tokens in tokens_seen]
figure, (left, right) = plt.subplots(
    1, 2, figsize=(8, 3.2), num="loss-and-perplexity", layout="constrained"
)
for losses, color, style, label in (
    (train_losses, "#0072b2", "-", "training"),
    (val_losses, "#d55e00", "--", "validation"),
):
    left.plot(seen, losses, style, color=color, label=label)
    right.semilogy(seen, [math.exp(loss) for loss in losses], style, color=color, label=label)
best = min(range(len(val_losses)), key=val_losses.__getitem__)
left.plot(seen[best], val_losses[best], "o", color="#d55e00", label=f"best: {val_losses[best]:.2f}")
left.axhline(nothing, color="#999999", lw=1, ls=":", label="knows nothing")
right.axhline(tokenizer.vocab_size, color="#999999", lw=1, ls=":")
left.set(xlabel="thousand tokens seen", ylabel="nats a token", title="Loss")
right.set(xlabel="thousand tokens seen", ylabel="equally likely tokens", title="Perplexity")
left.legend()
print(f"best validation loss {val_losses[best]:.3f}, perplexity {math.exp(val_losses[best]):.1f}, "
      f"in epoch {1 + best * EPOCHS // len(val_losses)} of {EPOCHS}")  # fmt: skip

# %% [markdown]
# ## At full size
#
# The book's run itself, GPT-2 124M on The Verdict, is the same code with other numbers.
# [The last page](13-the-verdict.md) has it, beside the losses that the book prints.
