"""Linear layers with int8 weights and a scale per feature, by a library's products."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_int8(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """y_nf = s_f sum_c q_fc x_nc, accumulated in fp32.

    PyTorch's product with int8 weights is the faster one for one row on a CPU; for several, fp32
    weights are made for the time of the product, and a library multiplies.

    Args:
        x: (N, C).
        weight: (F, C) int8, the q.
        scales: (F,) fp32.

    Returns:
        (N, F) in x's dtype.
    """
    if x.device.type == "cpu" and not x.requires_grad and x.shape[0] == 1:
        out: Tensor = torch.ops.aten._weight_int8pack_mm(x.float(), weight, scales)
    else:
        out = F.linear(x, weight.to(x.dtype)) * scales
    return out.to(x.dtype)
