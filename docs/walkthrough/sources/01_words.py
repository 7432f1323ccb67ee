# %% [markdown]
# # Words become numbers
#
# A language model computes with numbers, so a text is first cut into pieces, and every distinct
# piece gets an id. The simplest pieces are words and punctuation marks: one regular expression
# cuts, a sorted list of all distinct pieces numbers them.
# ([`word_tokenizers.py`](../../fastgpt2/ladder/word_tokenizers.py))

# %%
from fastgpt2.ladder import SimpleTokenizerV1, SimpleTokenizerV2, build_vocab, split_words

text = "The painter put down his brush. The picture--his last--was done; he knew it, didn't he?"
print(split_words(text))

# %% [markdown]
# The vocabulary maps each piece to its place in alphabetical order (capitals come first, as in
# ASCII). `SimpleTokenizerV1` looks pieces up, and puts them together again. Of the spaces it knows
# nothing: it sets one between two words and none before a mark, so `--` comes back with different
# spacing than it had.

# %%
vocab = build_vocab(text)
tokenizer = SimpleTokenizerV1(vocab)
ids = tokenizer.encode("The picture was his last.")
print(len(vocab), "words and marks")
print(ids)
print(tokenizer.decode(ids))
print(tokenizer.decode(tokenizer.encode(text)))

# %% [markdown]
# A word that is not in the vocabulary has no id. V1 can only refuse it, which makes it useless for
# any text but the one it was built from.

# %%
from fastgpt2 import UserError

try:
    tokenizer.encode("The painter put down his pen.")
except UserError as error:
    print(error)

# %% [markdown]
# `SimpleTokenizerV2` has two more tokens: `<|unk|>` stands for every unknown word, `<|endoftext|>`
# between texts that have nothing to do with each other. Now every text can be encoded, but what
# an unknown word was is lost. The next rung loses nothing.

# %%
v2 = SimpleTokenizerV2(build_vocab(text, special=("<|endoftext|>", "<|unk|>")))
ids = v2.encode("The painter put down his pen. <|endoftext|> He knew it.")
print(ids)
print(v2.decode(ids))
