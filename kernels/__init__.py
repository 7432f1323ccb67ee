"""The operations of GPT-2, each with a Triton, a PyTorch and a reference implementation.

One op, one name, three places: ``reference.py`` says what it means, ``jit/`` holds the Triton
kernels, and the module named after the op is its contract: what callers import from here.
"""

from fastgpt2.kernels.add_branch import add_branch
from fastgpt2.kernels.attention import attention
from fastgpt2.kernels.backend import Impl, explain, use_impl
from fastgpt2.kernels.cross_entropy import cross_entropy
from fastgpt2.kernels.decode_attention import append_kv, decode_attention
from fastgpt2.kernels.decode_head import decode_greedy, decode_head
from fastgpt2.kernels.decode_linear import decode_linear
from fastgpt2.kernels.decode_qkv import decode_qkv
from fastgpt2.kernels.embedding import embedding, tied_embedding
from fastgpt2.kernels.gelu import bias_gelu, gelu
from fastgpt2.kernels.layer_norm import add_layer_norm, layer_norm, stream_layer_norm
from fastgpt2.kernels.linear import linear
from fastgpt2.kernels.linear_cross_entropy import linear_cross_entropy
from fastgpt2.kernels.linear_fp8 import linear_fp8
from fastgpt2.kernels.linear_gelu import linear_gelu
from fastgpt2.kernels.mlp import mlp

# imported last: tells PyTorch's counter the FLOPs of the ops above
import fastgpt2.kernels.flops  # noqa: F401  # isort: skip

__all__ = [
    "Impl",
    "add_branch",
    "add_layer_norm",
    "append_kv",
    "attention",
    "bias_gelu",
    "cross_entropy",
    "decode_attention",
    "decode_greedy",
    "decode_head",
    "decode_linear",
    "decode_qkv",
    "embedding",
    "explain",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_fp8",
    "linear_gelu",
    "mlp",
    "stream_layer_norm",
    "tied_embedding",
    "use_impl",
]
