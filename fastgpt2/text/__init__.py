"""Text to tokens: tokenizers, corpora, token shards, loaders.

The public names are imported on first use, so that tokenizing in worker processes needs no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt2.text.bpe import GPT2Tokenizer
    from fastgpt2.text.corpora import Corpus, Document, load_corpus
    from fastgpt2.text.dataset import Dataset, build_dataset
    from fastgpt2.text.encoding import END_OF_TEXT, Tokenizer
    from fastgpt2.text.loaders import BlockLoader, BlockStream, create_dataloader, iter_eval_batches
    from fastgpt2.text.shards import TokenShards, create_shard
    from fastgpt2.text.tokenizers import (
        BytesTokenizer,
        CharTokenizer,
        IdTokenizer,
        get_tokenizer,
        load_tokenizer,
        save_tokenizer,
    )

# public name -> module that defines it; imported on first use (PEP 562)
_LAZY = {
    "BlockLoader": "loaders",
    "BlockStream": "loaders",
    "BytesTokenizer": "tokenizers",
    "CharTokenizer": "tokenizers",
    "Corpus": "corpora",
    "Dataset": "dataset",
    "Document": "corpora",
    "END_OF_TEXT": "encoding",
    "GPT2Tokenizer": "bpe",
    "IdTokenizer": "tokenizers",
    "TokenShards": "shards",
    "Tokenizer": "encoding",
    "build_dataset": "dataset",
    "create_dataloader": "loaders",
    "create_shard": "shards",
    "get_tokenizer": "tokenizers",
    "iter_eval_batches": "loaders",
    "load_corpus": "corpora",
    "load_tokenizer": "tokenizers",
    "save_tokenizer": "tokenizers",
}

__all__ = [
    "END_OF_TEXT",
    "BlockLoader",
    "BlockStream",
    "BytesTokenizer",
    "CharTokenizer",
    "Corpus",
    "Dataset",
    "Document",
    "GPT2Tokenizer",
    "IdTokenizer",
    "TokenShards",
    "Tokenizer",
    "build_dataset",
    "create_dataloader",
    "create_shard",
    "get_tokenizer",
    "iter_eval_batches",
    "load_corpus",
    "load_tokenizer",
    "save_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
