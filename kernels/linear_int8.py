"""Linear layers with int8 weights and a scale per feature, by a library's products."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels.linear import unchecked_linear
from fastgpt2.kernels.modes import is_ordinary

# numbers that stay in a processor's caches: 4 MB of fp32
_CACHED = 1 << 20


def linear_int8(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """y_nf = s_f sum_c q_fc x_nc, accumulated in fp32.

    No library multiplies int8 by fp32 fast on every processor, so weights are widened for their
    product. On a CPU some features at a time are: what is widened stays in the caches, and the
    int8 weights are all that memory is read for.

    Args:
        x: (N, C).
        weight: (F, C) int8, the q.
        scales: (F,) fp32.

    Returns:
        (N, F) in x's dtype.
    """
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and not x.requires_grad and is_ordinary(x, weight, scales):
        # one row is limited by what it reads, and not every processor multiplies bf16
        out = _by_parts(x.float() if len(x) == 1 else x, weight) * scales
    else:
        out = F.linear(x, weight.to(x.dtype)) * scales
    return out.to(x.dtype)


def _by_parts(x: Tensor, weight: Tensor) -> Tensor:
    features, width = weight.shape
    count = min(features, max(1, _CACHED // max(1, width)))
    wide, out = x.new_empty(count, width), x.new_empty(len(x), features)
    for first in range(0, features, count):
        part = weight[first : first + count]
        widened = wide[: len(part)].copy_(part)
        out[:, first : first + len(part)] = unchecked_linear(x, widened)
    return out
