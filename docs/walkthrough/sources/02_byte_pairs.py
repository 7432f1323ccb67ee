# %% [markdown]
# # Byte pairs
#
# Byte-pair encoding starts from the 256 bytes, with which any text can be spelled, and gives ids
# to frequent pieces: it finds the most frequent pair of neighbours, makes it a token, and begins
# again. Common words end up as one token, rare ones as a few, and nothing is unknown.
# ([`byte_pairs.py`](../../fastgpt2/ladder/byte_pairs.py); Sennrich, Haddow and Birch, 2016)
#
# The text to learn from is prose that comes with Python: the help texts of its `help()`.

# %%
from fastgpt2.ladder import BytePairEncoder
from fastgpt2.text import load_corpus

text = "".join(load_corpus("python-docs").pieces())[:40_000]
print(text[:200])

# %% parameters
VOCAB_SIZE = 512

# %% [markdown]
# The first merges join the commonest pairs of letters; later ones already join whole words. A token
# may begin with a space (here `·`), because GPT-2's pattern cuts the text before the space, not
# after it.

# %%
encoder = BytePairEncoder.train(text, VOCAB_SIZE)
merged = [encoder.decode([i]).replace(" ", "·") for i in range(256, encoder.vocab_size)]
print("first:", *merged[:24])
print("last: ", *merged[-16:])

# %% [markdown]
# Encoding repeats the merges in the order in which they were learned. A word the text never had is
# spelled with the pieces there are, and decoding gives back every byte.

# %%
for word in (" assignment", " reassigned", " naïveté"):
    ids = encoder.encode(word)
    pieces = [encoder.decode([i]).replace(" ", "·") for i in ids]
    print(ids, pieces, encoder.decode(ids) == word)

# %% [markdown]
# [tiktoken](https://github.com/openai/tiktoken) applies merges in compiled code. Given the same
# ones, it must say the same.

# %%
import tiktoken

from fastgpt2.text.bpe import PATTERN

fast = tiktoken.Encoding("ours", pat_str=PATTERN, mergeable_ranks=encoder.ranks, special_tokens={})
print("equal:", encoder.encode(text) == fast.encode(text))

# %% [markdown]
# The more merges, the fewer tokens for the same text, and the more text fits into the model's
# context. Each further merge saves less than the one before. An encoder with the first n merges is
# part of the one with all of them, so one training gives the whole curve.

# %%
import matplotlib.pyplot as plt

sizes = range(256, encoder.vocab_size + 1, 16)
held_out = "".join(load_corpus("python-docs").pieces())[100_000:140_000]
figure, axes = plt.subplots(figsize=(5.6, 3.2), num="compression")
for name, sample in (("the text it learned from", text), ("other text", held_out)):
    rates = []
    for size in sizes:
        ranks = {token: id_ for token, id_ in encoder.ranks.items() if id_ < size}
        part = tiktoken.Encoding("part", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        rates.append(len(sample.encode("utf-8")) / len(part.encode(sample)))
    axes.plot(sizes, rates, label=name)
    print(f"{name}: {rates[-1]:.2f} bytes a token")
axes.set(
    xlabel="vocabulary size", ylabel="bytes a token", title="The more merges, the fewer tokens"
)
axes.legend()

# %% [markdown]
# GPT-2's tokenizer is this algorithm with 50,000 merges, stored in two files: `encoder.json` (token
# to id) and `vocab.bpe` (the merges). Both spell each byte as a printable character, the space as
# `Ġ`. Written out in that form, our encoder is read by the package's `GPT2Tokenizer`, which also
# knows the 50,257th token, `<|endoftext|>`.

# %%
from fastgpt2.ladder import GPT2Tokenizer

encoder_json, vocab_bpe = encoder.gpt2_files()
print(vocab_bpe.splitlines()[:6])
tokenizer = GPT2Tokenizer(encoder_json, vocab_bpe)
print("equal:", tokenizer.encode(held_out) == encoder.encode(held_out))
print(tokenizer.encode("<|endoftext|>", allow_special=True))
