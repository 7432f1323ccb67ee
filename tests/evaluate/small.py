"""A model that reads bytes, and texts and task files for it."""

import json
from pathlib import Path
from typing import Any

import torch

from fastgpt2.model import GPT
from fastgpt2.text import BytesTokenizer, save_tokenizer
from fastgpt2.weights import load, save
from tests.tiny_gpt import tiny_gpt

# two, three and four bytes a character too
TEXT = "The cat — näher – sat on the mat. 猫は🙂\nAnd then?\n\n" * 12 + "It left."

HELLASWAG: list[dict[str, Any]] = [
    {"ctx": "A man", "endings": ["sits down.", "is", "runs away fast.", "?"], "label": 2},
    {"ctx": "She opens the", "endings": ["door", "doors.", "sky and", "a b c"], "label": 0},
    {"ctx": "Then", "endings": ["he", "she sings", "we", "they all go"], "label": 3},
    {"ctx": "x" * 40, "endings": ["one", "two", "three", "four"], "label": 1},
    {"ctx": "We", "endings": ["aaaa", "a", "aa", "aaa"], "label": "1"},
]
LAMBADA = ["the cat sat on the mat", 'he said "no" and left', "x" * 40 + " end", "a b"]


def byte_gpt(seed: int = 0, **fields: Any) -> GPT:
    """A random model of the bytes, 24 of context."""
    return tiny_gpt(seed, **({"vocab_size": 257, "block_size": 24} | fields)).eval()


def save_run(model: GPT, path: Path) -> Path:
    """A run folder with its tokenizer, through a file of nanoGPT's."""
    fields = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    arguments = {name: getattr(model.config, name) for name in fields}
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.with_suffix(".pt")
    torch.save({"model": model.state_dict(), "model_args": arguments}, source)
    save(load(source), path, "fastgpt2")
    save_tokenizer(BytesTokenizer(), path)
    return path


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    """JSON Lines."""
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path
