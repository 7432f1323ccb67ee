"""Weights of 8 bits for inference: one byte per weight, one scale per row.

``model.quantize("int8")`` replaces each linear layer, the token embedding and the head. The weight
of row f is W_fc = s_f q_fc, with an integer q of at most 127 in size and s_f = max_c |W_fc| / 127
(symmetric, per row: Dettmers et al., "LLM.int8()", 2022, section 2). Activations, positions, biases
and LayerNorms stay as they are. Decoding reads each weight once per token, so a quarter of the
bytes is a quarter of the time where memory is the limit. Shapes: C in, F out, V vocabulary.
"""

from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt2.errors import UserError
from fastgpt2.kernels.linear_int8 import linear_int8
from fastgpt2.plain import obstacle, replaceable

KINDS = ("int8",)
_LARGEST = 127
# a scale keeps 16 significant bits of fp32's 24: its product with an integer of 7 bits is exact, so
# weights that were dequantized and are quantized again have the same integers and scales
_SPARE = 1 << 8


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(F, C) -> the integers (F, C) int8 and the scales (F,) fp32, with weight ~ scale x integer.

    No weight moves by more than half a scale and the rounding of that scale, 2^-16 of the weight.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    weight = weight.detach().float()
    largest = weight.abs().amax(dim=1) if weight.shape[1] else weight.new_zeros(weight.shape[0])
    if not largest.isfinite().all():
        raise UserError("quantize: a weight is NaN or infinite")
    # up to the next multiple of the spare bits, on the float's own bits: still positive, in order
    bits = (largest / _LARGEST).view(torch.int32)
    scales = ((bits + (_SPARE - 1)) & -_SPARE).view(torch.float32)
    scales = torch.where(scales == 0, 1.0, scales)
    return (weight / scales[:, None]).round().to(torch.int8), scales


def dequantize_rows(weight: Tensor, scales: Tensor) -> Tensor:
    """The integers (F, C) and scales (F,) -> the weights (F, C) that they stand for, fp32."""
    return weight.float() * scales[:, None].float()


class Quantizable(nn.Module):
    """A model that can be kept in 8 bits."""

    def quantize(self, kind: str = "int8") -> Self:
        """Keep all matrices but the positions in 8 bits, in place: for inference only.

        Args:
            kind: ``int8``, a symmetric scale per row. The integers come from the weights in the
                dtype that they have now; a later ``to(dtype)`` leaves integers and scales alone.

        Returns:
            This model.

        Raises:
            UserError: the kind is unknown, or a layer is quantized already, hooked or replaced, or
                its weights are not finite; the model is as it was.
        """
        quantize_modules(self, kind)
        return self


class _Quantized(nn.Module):
    """Integers (F, C) int8, a parameter without a gradient, and scales (F,), always fp32."""

    scales: Tensor

    def __init__(self, weight: nn.Parameter, scales: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("scales", scales)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # model.to(torch.bfloat16) moves and casts what is floating point: scales only move
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != torch.float32:
            self.scales = scales.to(self.scales.device)
        return self


@replaceable
class QuantizedEmbedding(_Quantized):
    """Rows of a table: s_v q_v."""

    def forward(self, idx: Tensor) -> Tensor:
        """(...) ids -> (..., C), fp32."""
        return F.embedding(idx, self.weight).float() * self.scales[idx][..., None]


@replaceable
class QuantizedLinear(_Quantized):
    """y = s (q x) + b, with the product accumulated in fp32.

    Args:
        weight: (F, C) int8.
        scales: (F,) fp32.
        bias: (F,) or None.
    """

    def __init__(self, weight: nn.Parameter, scales: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__(weight, scales)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., F), in x's dtype."""
        out = linear_int8(x.reshape(-1, x.shape[-1]), self.weight, self.scales)
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).view(*x.shape[:-1], self.weight.shape[0])


def quantize_modules(model: nn.Module, kind: str) -> None:
    """Replace every linear layer, and the embedding that is tied to one.

    Raises:
        UserError: the kind is unknown, a layer is quantized already, not plain, or not finite.
    """
    if kind not in KINDS:
        raise UserError(f"quantize: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    layers = dict(model.named_modules(remove_duplicate=False))
    chosen: dict[str, nn.Linear | nn.Embedding] = {}
    linears = {id(m.weight) for m in layers.values() if isinstance(m, nn.Linear)}
    for name, layer in layers.items():
        if isinstance(layer, _Quantized):
            raise UserError(f"quantize: {name} is quantized already")
        if isinstance(layer, nn.Embedding) and id(layer.weight) not in linears:
            continue
        for base in (nn.Linear, nn.Embedding):
            if isinstance(layer, base):
                if reason := obstacle(layer, base):
                    raise UserError(f"quantize: {name} cannot be quantized: {reason}")
                chosen[name] = layer
    # shared weights stay shared; all are computed before the first layer is replaced
    tables: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for layer in chosen.values():
        if id(layer.weight) not in tables:
            integers, scales = quantize_rows(layer.weight)
            tables[id(layer.weight)] = nn.Parameter(integers, requires_grad=False), scales
    for name, layer in chosen.items():
        weight, scales = tables[id(layer.weight)]
        parent, _, child = name.rpartition(".")
        new: nn.Module
        if isinstance(layer, nn.Embedding):
            new = QuantizedEmbedding(weight, scales)
        else:
            new = QuantizedLinear(weight, scales, cast(nn.Parameter | None, layer.bias))
        setattr(layers[parent], child, new.train(layer.training))
