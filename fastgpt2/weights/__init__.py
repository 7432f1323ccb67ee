"""Weights of GPT-2 in every format people have them in, read lazily and written exactly.

>>> checkpoint = load("models/124M")
>>> save(checkpoint, "gpt2-hf", "hf")
"""

from fastgpt2.weights.checkpoint import Checkpoint
from fastgpt2.weights.formats import FORMATS, load, save, save_model
from fastgpt2.weights.hub import RELEASES, load_pretrained

__all__ = ["FORMATS", "RELEASES", "Checkpoint", "load", "load_pretrained", "save", "save_model"]
