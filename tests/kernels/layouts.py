"""The same values, laid out in the ways that a kernel could trip over."""

import torch
from torch import Tensor

LAYOUTS = ("rows with a stride", "columns with a stride", "transposed")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """``x`` as a view with that layout; what lies between its elements is not zero."""
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "rows with a stride":
        return torch.cat([x, x.neg()], -1)[..., : x.shape[-1]]
    return torch.stack([x, x.neg()], -1).flatten(-2)[..., ::2]
