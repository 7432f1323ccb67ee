import inspect
import subprocess
import sys

import pytest

from fastgpt2 import ladder

# constructors and functions as the readers of the book know them
CONSTRUCTORS = {
    "SelfAttentionV1": "d_in, d_out",
    "SelfAttentionV2": "d_in, d_out, qkv_bias=False",
    "CausalAttention": "d_in, d_out, context_length, dropout, qkv_bias=False",
    "MultiHeadAttentionWrapper": "d_in, d_out, context_length, dropout, num_heads, qkv_bias=False",
    "MultiHeadAttention": "d_in, d_out, context_length, dropout, num_heads, qkv_bias=False",
    "LayerNorm": "emb_dim",
    "FeedForward": "cfg",
    "TransformerBlock": "cfg",
    "DummyGPTModel": "cfg",
    "GPTModel": "cfg",
    "SimpleTokenizerV1": "vocab",
    "SimpleTokenizerV2": "vocab",
    "GPTDatasetV1": "txt, tokenizer, max_length, stride",
    "generate_text_simple": "model, idx, max_new_tokens, context_size",
    "calc_loss_batch": "input_batch, target_batch, model, device",
    "calc_loss_loader": "data_loader, model, device, num_batches=None",
    "train_model_simple": "model, train_loader, val_loader, optimizer, device, num_epochs, "
    "eval_freq, eval_iter, start_context, tokenizer",
    "load_weights_into_gpt": "gpt, params",
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_signatures_are_the_books(name: str) -> None:
    parameters = inspect.signature(getattr(ladder, name)).parameters.values()
    known = (p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)
    assert ", ".join(known) == CONSTRUCTORS[name]


@pytest.mark.parametrize("name", ladder.__all__)
def test_every_name_is_importable(name: str) -> None:
    assert getattr(ladder, name) is not None


def test_every_name_has_a_home_and_no_other_has() -> None:
    assert sorted(ladder.__all__) == sorted(ladder._HOME)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'fastgpt2\.ladder' has no attribute 'Nope'"):
        ladder.Nope  # noqa: B018


def test_importing_the_ladder_imports_neither_torch_nor_tiktoken() -> None:
    code = "import sys, fastgpt2.ladder; print(sorted({'torch', 'tiktoken'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True
    )
    assert done.stdout.strip() == "[]"
