"""Linear layers for a few rows, written for the compiler: each weight is read once.

For one row, a library's product is bound by memory. For a few rows it packs the weights first,
which costs more than the product. Here row b is y_bf = sum_c W_fc x_bc, a multiplication and a sum.
Inductor turns all rows into one loop over F, which reads each weight once and accumulates in fp32.
Uncompiled it would be slow. Shapes: B rows, C wide, F features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# beyond it the loop has more accumulators than a processor has registers
MAX_ROWS = 8
# int8 weights in one fp32 word
_IN_A_WORD = 4


def words(weight: Tensor) -> Tensor:
    """(F, C) int8 -> (F, C / 4) fp32: four weights in each word, or the weights where C does not
    divide.

    The compiler loads a vector of fp32 in one instruction, and a vector of int8 byte by byte.
    """
    if weight.shape[1] % _IN_A_WORD or not weight.is_contiguous():
        return weight
    return weight.detach().view(torch.float32)


def few_rows_linear(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    """y_bf = s_f sum_c W_fc x_bc, for up to ``MAX_ROWS`` rows, inside a compiled function.

    Args:
        x: (B, C).
        weight: (F, C) floating point or int8; or (F, C / 4), the ``words`` of int8.
        scales: (F,), or None for 1.

    Returns:
        (B, F) fp32, accumulated in fp32.
    """
    x = x.float()
    if weight.shape[1] == x.shape[1]:
        rows = [(weight.float() * row).sum(dim=-1) for row in x.unbind()]
    else:
        rows = _rows_of_words(x, weight.view(torch.int32))
    out = torch.stack(rows)
    return out if scales is None else out * scales


def _rows_of_words(x: Tensor, packed: Tensor) -> list[Tensor]:
    """sum_c W_fc x_bc: the four weights of each word are multiplied with their columns of x."""
    B, C = x.shape
    # four planes (B, C / 4): the columns of the words' lowest bytes, then of the next ones; a
    # concatenation is a separate buffer, which the loop reads in order
    columns = x.view(B, C // _IN_A_WORD, _IN_A_WORD).unbind(dim=2)
    planes = torch.cat(columns).view(_IN_A_WORD, B, C // _IN_A_WORD)
    # a shift to the left and an arithmetic one to the right leave one byte, with its sign
    parts = [((packed << (24 - 8 * i)) >> 24).float() for i in range(_IN_A_WORD)]
    return [
        (
            parts[0] * planes[0, b]
            + parts[1] * planes[1, b]
            + parts[2] * planes[2, b]
            + parts[3] * planes[3, b]
        ).sum(dim=-1)
        for b in range(B)
    ]


def many_rows_linear(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    """The same with a library, for any number of rows: (B, F) in x's dtype.

    PyTorch's product with int8 weights is the faster one for one row on a CPU. For several rows a
    library multiplies with a temporary copy of the weights in fp32.

    Args:
        x: (B, C).
        weight: (F, C) floating point or int8; not ``words``.
        scales: (F,), or None for 1.
    """
    if scales is None:
        return F.linear(x, weight)
    if x.device.type == "cpu" and not x.requires_grad and x.shape[0] == 1:
        out: Tensor = torch.ops.aten._weight_int8pack_mm(x.float(), weight, scales)
    else:
        out = F.linear(x, weight.to(x.dtype)) * scales
    return out.to(x.dtype)
