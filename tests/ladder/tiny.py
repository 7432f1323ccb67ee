"""A small story, a small configuration, a small model: enough to tell right from wrong."""

import random
from typing import Any

import torch

from fastgpt2.ladder import GPTModel

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "context_length": 16,
    "emb_dim": 24,
    "n_heads": 3,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": True,
}


def story(sentences: int = 60) -> str:
    """Sentences that a grammar of a few words makes; always the same ones."""
    draw = random.Random(0)
    who = ["the painter", "her brother", "the old widow", "a stranger"]
    did = ["painted", "praised", "hid", "had sold"]
    what = ["a portrait", "the last picture", "his sketch of the donkey", "nothing"]
    when = ["that winter", "in Florence", "before the wedding", "without a word"]
    parts = [[draw.choice(words) for words in (who, did, what, when)] for _ in range(sentences)]
    return " ".join(f"{' '.join(sentence).capitalize()}." for sentence in parts)


def model(seed: int = 0, **changes: Any) -> GPTModel:
    """A model in evaluation mode whose every parameter is random, biases and norms too."""
    torch.manual_seed(seed)
    gpt = GPTModel(SMALL | changes)
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return gpt.eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random ids below the small vocabulary."""
    return torch.randint(SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))
