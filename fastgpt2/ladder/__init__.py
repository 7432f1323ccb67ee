"""The road to GPT-2: from splitting a text into words to GPT-2's own weights, rung by rung.

Each module is short, stands on the ones above it and is tested against the next. Read in order:

1.  ``word_tokenizers``   a text split by a regular expression, a vocabulary of its words
2.  ``byte_pairs``        byte-pair encoding trained and applied in plain Python, then GPT-2's
3.  ``windows``           inputs and targets: a window that slides over the tokens
4.  ``embeddings``        a vector for each token and one for each position
5.  ``self_attention``    from dot products to causal attention with one head
6.  ``multi_head``        several heads: stacked, then as one projection
7.  ``fused_attention``   the same numbers faster: packed QKV, PyTorch's fused op, ours
8.  ``same_weights``      the weights of each attention carried to the next; all of them timed
9.  ``block``             LayerNorm, GELU, feed-forward, shortcut connections, the block
10. ``gpt``               a GPT of placeholders, then the real one
11. ``sampling``          the next token: greedy, temperature, top-k
12. ``training``          the loss, and the loop that lowers it
13. ``released_weights``  OpenAI's weights, and the way to ``fastgpt2.GPT`` and back

Constructors, configuration keys and state-dict names are those of Raschka, "Build a Large Language
Model (From Scratch)", 2024, so that its readers find their way and their checkpoints load.
``python -m fastgpt2.ladder`` times the attentions; ``docs/walkthrough/`` explains each rung.
Every name is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt2.ladder.block import (
        GELU,
        DeepNetwork,
        FeedForward,
        LayerNorm,
        TransformerBlock,
        mean_gradients,
    )
    from fastgpt2.ladder.byte_pairs import BytePairEncoder, GPT2Tokenizer
    from fastgpt2.ladder.embeddings import TokenEmbedder
    from fastgpt2.ladder.fused_attention import (
        KernelMultiHeadAttention,
        PackedMultiHeadAttention,
        PyTorchMultiHeadAttention,
        SDPAMultiHeadAttention,
    )
    from fastgpt2.ladder.gpt import GPT_CONFIG_124M, DummyGPTModel, GPTModel
    from fastgpt2.ladder.gpt_download import (
        assign,
        download_and_load_gpt2,
        load_gpt2_params_from_tf_ckpt,
    )
    from fastgpt2.ladder.multi_head import MultiHeadAttention, MultiHeadAttentionWrapper
    from fastgpt2.ladder.released_weights import (
        from_fastgpt2,
        load_weights_into_gpt,
        openai_params,
        to_fastgpt2,
    )
    from fastgpt2.ladder.same_weights import attention_rungs
    from fastgpt2.ladder.sampling import generate, generate_text_simple, next_token_probabilities
    from fastgpt2.ladder.self_attention import (
        CausalAttention,
        SelfAttention_v1,
        SelfAttention_v2,
        SelfAttentionV1,
        SelfAttentionV2,
        attend,
        attention_weights,
        simple_attention,
    )
    from fastgpt2.ladder.training import (
        calc_loss_batch,
        calc_loss_loader,
        evaluate_model,
        generate_and_print_sample,
        plot_losses,
        text_to_token_ids,
        token_ids_to_text,
        train_model_simple,
    )
    from fastgpt2.ladder.windows import GPTDatasetV1, create_dataloader, create_dataloader_v1
    from fastgpt2.ladder.word_tokenizers import (
        SimpleTokenizerV1,
        SimpleTokenizerV2,
        build_vocab,
        split_words,
    )

# module -> the public names it defines, in reading order
_RUNGS = {
    "word_tokenizers": "split_words build_vocab SimpleTokenizerV1 SimpleTokenizerV2",
    "byte_pairs": "BytePairEncoder GPT2Tokenizer",
    "windows": "GPTDatasetV1 create_dataloader create_dataloader_v1",
    "embeddings": "TokenEmbedder",
    "self_attention": "simple_attention attention_weights attend SelfAttentionV1 SelfAttentionV2 "
    "SelfAttention_v1 SelfAttention_v2 CausalAttention",
    "multi_head": "MultiHeadAttentionWrapper MultiHeadAttention",
    "fused_attention": "PackedMultiHeadAttention SDPAMultiHeadAttention KernelMultiHeadAttention "
    "PyTorchMultiHeadAttention",
    "same_weights": "attention_rungs",
    "block": "LayerNorm GELU FeedForward DeepNetwork mean_gradients TransformerBlock",
    "gpt": "GPT_CONFIG_124M DummyGPTModel GPTModel",
    "sampling": "generate_text_simple next_token_probabilities generate",
    "training": "text_to_token_ids token_ids_to_text calc_loss_batch calc_loss_loader "
    "evaluate_model train_model_simple generate_and_print_sample plot_losses",
    "gpt_download": "download_and_load_gpt2 load_gpt2_params_from_tf_ckpt assign",
    "released_weights": "load_weights_into_gpt openai_params to_fastgpt2 from_fastgpt2",
}
_HOME = {name: module for module, names in _RUNGS.items() for name in names.split()}

__all__ = [
    "GELU",
    "GPT_CONFIG_124M",
    "BytePairEncoder",
    "CausalAttention",
    "DeepNetwork",
    "DummyGPTModel",
    "FeedForward",
    "GPT2Tokenizer",
    "GPTDatasetV1",
    "GPTModel",
    "KernelMultiHeadAttention",
    "LayerNorm",
    "MultiHeadAttention",
    "MultiHeadAttentionWrapper",
    "PackedMultiHeadAttention",
    "PyTorchMultiHeadAttention",
    "SDPAMultiHeadAttention",
    "SelfAttentionV1",
    "SelfAttentionV2",
    "SelfAttention_v1",
    "SelfAttention_v2",
    "SimpleTokenizerV1",
    "SimpleTokenizerV2",
    "TokenEmbedder",
    "TransformerBlock",
    "assign",
    "attend",
    "attention_rungs",
    "attention_weights",
    "build_vocab",
    "calc_loss_batch",
    "calc_loss_loader",
    "create_dataloader",
    "create_dataloader_v1",
    "download_and_load_gpt2",
    "evaluate_model",
    "from_fastgpt2",
    "generate",
    "generate_and_print_sample",
    "generate_text_simple",
    "load_gpt2_params_from_tf_ckpt",
    "load_weights_into_gpt",
    "mean_gradients",
    "next_token_probabilities",
    "openai_params",
    "plot_losses",
    "simple_attention",
    "split_words",
    "text_to_token_ids",
    "to_fastgpt2",
    "token_ids_to_text",
    "train_model_simple",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
