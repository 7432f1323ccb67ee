"""The models that are compared: where their weights and tokenizers are, checked before any runs."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.model import GPT
from fastgpt2.text.bpe import FILE_NAMES, GPT2Tokenizer
from fastgpt2.text.encoding import Tokenizer
from fastgpt2.text.tokenizers import FILE_NAME, load_tokenizer
from fastgpt2.weights import load

_GPT2_VOCAB = GPTConfig().vocab_size


@dataclass(frozen=True)
class Candidate:
    """A model that has not been read yet. ``name`` is what the user calls it."""

    name: str
    path: Path
    config: GPTConfig
    tokenizer: Tokenizer

    def load(self, device: torch.device, impl: str) -> GPT:
        """The model in fp32, in evaluation mode."""
        model = GPT.from_pretrained(str(self.path), {"impl": impl})
        return model.to(device, torch.float32).eval()


def find_candidate(name: str, path: Path, fallback: Tokenizer | None = None) -> Candidate:
    """Look at a model without reading its weights.

    Args:
        name: for messages and tables.
        path: a run or checkpoint folder, or a folder or file in any known format.
        fallback: the tokenizer of a model that brings none.

    Raises:
        UserError: no model there, a damaged one, no tokenizer for it, or one that does not fit.
    """
    config = load(path).config
    tokenizer = find_tokenizer(path) or fallback
    if tokenizer is None and config.vocab_size >= _GPT2_VOCAB:
        # files of nanoGPT and llm.c bring no vocabulary: it is OpenAI's
        tokenizer = GPT2Tokenizer.load()
    if tokenizer is None:
        raise UserError(f"{name}: no tokenizer beside it; give --tokenizer or --vocab-dir")
    # a file may hold the padding of a vocabulary, so only a smaller one is a mistake
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model "
            f"{config.vocab_size}"
        )
    return Candidate(name, path, config, tokenizer)


def find_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer beside a model: ours, or GPT-2's vocabulary under any of its names."""
    folder = path if path.is_dir() else path.parent
    # a run keeps its tokenizer at the top, two folders above a checkpoint
    for place in (folder, *folder.absolute().parents[1:2]):
        if (place / FILE_NAME).is_file():
            return load_tokenizer(place)
    single = (folder / "tokenizer.json").is_file()
    if single or any(all((folder / f).is_file() for f in pair) for pair in FILE_NAMES):
        return GPT2Tokenizer.from_folder(folder)
    return None
