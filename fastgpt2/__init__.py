"""GPT-2 in PyTorch, from scratch, exact, and fast.

>>> from fastgpt2 import GPT, GPTConfig
>>> model = GPT(GPTConfig.preset("gpt2"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastgpt2 import early

if TYPE_CHECKING:
    from fastgpt2.config import GPTConfig
    from fastgpt2.errors import UserError
    from fastgpt2.integrations.huggingface import GPT2LMHeadModel, accelerate, restore
    from fastgpt2.lora import add_lora, merge_lora
    from fastgpt2.model import GPT
    from fastgpt2.text import create_dataloader
    from fastgpt2.weights.adapter import load_adapter, save_adapter

__version__ = "0.1.0"

if early.is_program(__name__):
    # python -m fastgpt2.train: importing PyTorch takes seconds
    early.end_at_once()

# public name -> module that defines it; imported on first use (PEP 562)
_LAZY = {
    "GPT": "fastgpt2.model",
    "GPT2LMHeadModel": "fastgpt2.integrations.huggingface",
    "GPTConfig": "fastgpt2.config",
    "UserError": "fastgpt2.errors",
    "accelerate": "fastgpt2.integrations.huggingface",
    "add_lora": "fastgpt2.lora",
    "create_dataloader": "fastgpt2.text",
    "load_adapter": "fastgpt2.weights.adapter",
    "merge_lora": "fastgpt2.lora",
    "restore": "fastgpt2.integrations.huggingface",
    "save_adapter": "fastgpt2.weights.adapter",
}

__all__ = [
    "GPT",
    "GPT2LMHeadModel",
    "GPTConfig",
    "UserError",
    "__version__",
    "accelerate",
    "add_lora",
    "create_dataloader",
    "load_adapter",
    "merge_lora",
    "restore",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastgpt2' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
