# %% [markdown]
# # The Verdict, at full size
#
# All rungs together: the run of chapter 5 of Raschka's book, GPT-2 124M on one short story, with
# the book's numbers. Nothing of the package's fast model takes part: the attention is
# `MultiHeadAttention`, the loop is `train_model_simple`. On a CPU that takes many minutes and 5 GB
# of memory, so `python -m docs.walkthrough.build` makes this page only when told its name.

# %% parameters
TEXT = "the-verdict"
TOKENIZER = "gpt2"
CHARACTERS = None
SIZE = {"context_length": 256}
EPOCHS = 10

# %%
import torch

from fastgpt2.ladder import GPT_CONFIG_124M, GPTModel, create_dataloader
from fastgpt2.text import get_tokenizer, load_corpus

text = "".join(load_corpus(TEXT).pieces())[:CHARACTERS]
tokenizer = get_tokenizer(TOKENIZER)
cfg = GPT_CONFIG_124M | SIZE | {"vocab_size": tokenizer.vocab_size}
T = cfg["context_length"]
cut = int(0.9 * len(text))
train_loader = create_dataloader(text[:cut], 2, T, T, tokenizer=tokenizer)
val_loader = create_dataloader(
    text[cut:], 2, T, T, shuffle=False, drop_last=False, tokenizer=tokenizer
)
for name, loader in (("training", train_loader), ("validation", val_loader)):
    print(f"{name}: {sum(inputs.numel() for inputs, _ in loader):,} tokens, {len(loader)} batches")
print(cfg)

# %% [markdown]
# What does the model know before it has seen a word? Nothing: its loss is close to the logarithm
# of the vocabulary's size.

# %%
import math

from fastgpt2.ladder import calc_loss_loader

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(123)
model = GPTModel(cfg).to(device).eval()
torch.manual_seed(123)
untrained = [calc_loss_loader(loader, model, device) for loader in (train_loader, val_loader)]
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
print(f"training loss {untrained[0]:.6f}, validation loss {untrained[1]:.6f} nats a token")
print(f"log {cfg['vocab_size']:,} = {math.log(cfg['vocab_size']):.6f}")

# %%
import time

from fastgpt2.ladder import train_model_simple

torch.manual_seed(123)
model = GPTModel(cfg).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
begin = time.perf_counter()
train_losses, val_losses, tokens_seen = train_model_simple(
    model, train_loader, val_loader, optimizer, device,
    num_epochs=EPOCHS, eval_freq=5, eval_iter=5,
    start_context="Every effort moves you", tokenizer=tokenizer,
)  # fmt: skip
minutes = (time.perf_counter() - begin) / 60

# %%
import platform
import re
from pathlib import Path

cpuinfo = Path("/proc/cpuinfo")
known = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
cpu = (re.findall(r"model name\s*: (.*)", known) or [platform.processor()])[0]
machine = torch.cuda.get_device_name() if device == "cuda" else cpu
print(f"{minutes:.1f} minutes on {machine}, {torch.get_num_threads()} threads")
print(f"PyTorch {torch.__version__}, Python {platform.python_version()}")
print(f"training loss {train_losses[0]:.3f} -> {train_losses[-1]:.3f}, "
      f"validation loss {val_losses[0]:.3f} -> {val_losses[-1]:.3f}")  # fmt: skip

# %% [markdown]
# The seeds, the order in which weights are drawn and the order of the batches are the book's. So
# its printed losses should come out, too, on another machine and a later PyTorch. (All digits of
# ours are in [13-the-verdict.jsonl](13-the-verdict.jsonl).)

# %%
# (training, validation) loss at steps 0, 5, 10, ..., as chapter 5 of the book prints them
BOOK = [(9.781, 9.933), (8.111, 8.339), (6.661, 7.048), (5.961, 6.616), (5.726, 6.600),
        (5.201, 6.348), (4.417, 6.278), (4.069, 6.226), (3.732, 6.160), (2.850, 6.179),
        (2.427, 6.141), (2.104, 6.134), (1.882, 6.233), (1.320, 6.238), (0.985, 6.242),
        (0.717, 6.293), (0.541, 6.393), (0.391, 6.452)]  # fmt: skip

# %%
records = [
    {"step": 5 * i, "tokens": tokens, "train_loss": train_loss, "val_loss": val_loss}
    for i, (tokens, train_loss, val_loss) in enumerate(
        zip(tokens_seen, train_losses, val_losses, strict=True)
    )
]
apart = 0.0
print("| step | tokens seen | training | the book's | validation | the book's |")
print("|---:|---:|---:|---:|---:|---:|")
for record, (book_train, book_val) in zip(records, BOOK, strict=False):
    print(f"| {record['step']} | {record['tokens']:,} | {record['train_loss']:.3f} | "
          f"{book_train:.3f} | {record['val_loss']:.3f} | {book_val:.3f} |")  # fmt: skip
    apart = max(apart, abs(record["train_loss"] - book_train), abs(record["val_loss"] - book_val))

# %%
print(f"largest difference from the book: {apart:.3f} nats a token")

# %% [markdown]
# The training loss falls to almost nothing: the model learns the nine tenths of the story that it
# sees by heart. On the last tenth, which it does not see, it gains only at first, while it learns
# which words are common; then its loss turns and rises. This is overfitting, the fate of 163
# million parameters that meet five thousand tokens.

# %%
import matplotlib.pyplot as plt

epochs_seen = [tokens / (len(train_loader) * 2 * T) for tokens in tokens_seen]
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.6), num="loss-and-perplexity", layout="constrained"
)
for losses, column, color, style, label in (
    (train_losses, 0, "#0072b2", "-", "training"),
    (val_losses, 1, "#d55e00", "--", "validation"),
):
    left.plot(epochs_seen, losses, style, color=color, label=label)
    book = [row[column] for row in BOOK[: len(losses)]]
    left.plot(epochs_seen[: len(book)], book, "o", color=color, mfc="none", ms=5,
              label=f"{label}, the book's")  # fmt: skip
    right.semilogy(epochs_seen, [math.exp(loss) for loss in losses], style, color=color)
left.set(xlabel="epochs", ylabel="nats a token", title="Loss", ylim=(0, None))
right.set(xlabel="epochs", ylabel="equally likely tokens", title="Perplexity")
left.legend()

# %% [markdown]
# How much is memory? A greedy text after the words the samples began with, and the longest stretch
# of it that stands in the training text, letter for letter:

# %%
from fastgpt2.ladder import generate, text_to_token_ids, token_ids_to_text

model.eval()
start = text_to_token_ids("Every effort moves you", tokenizer).to(device)


def longest_quotation(said):
    """The longest stretch of a text that stands in the training text."""
    spans = ((i, j) for i in range(len(said)) for j in range(i + 1, len(said) + 1))
    return max((said[i:j] for i, j in spans if said[i:j] in text[:cut]), key=len, default="")


greedy = token_ids_to_text(generate(model, start, 50, T), tokenizer)
quotation = longest_quotation(greedy)
print(greedy)
print(f"\n{len(quotation)} of {len(greedy)} characters in one stretch: {quotation!r}")

# %% [markdown]
# Temperature and top-k loosen its tongue (seed, temperature 1.4 and top-k 25 as in the book):

# %%
for temperature, k in ((0.7, 25), (1.4, 25), (1.4, None)):
    torch.manual_seed(123)
    drawn = generate(model, start, 15, T, temperature=temperature, top_k=k)
    said = token_ids_to_text(drawn, tokenizer)
    quoted = f"{len(longest_quotation(said))} of {len(said)} characters quoted"
    print(f"temperature {temperature}, top_k {k}, {quoted}:\n  {said!r}")

# %% [markdown]
# The same run through the package's own trainer, with checkpoints, curves, a tied head and the
# fast kernels, is `python -m fastgpt2.train --config the-verdict`.
