"""Low-rank adapters: fine-tune a small part of a model (Hu et al., "LoRA", 2021).

The weight W (F, C) of a linear layer does not change, and the layer computes
x W^T + b + (alpha / R) x A^T B^T with trained A (R, C) and B (F, R). B begins at zero, so the model
begins unchanged. PEFT computes the same for GPT-2, in the same order. Shapes: C in, F out, R rank.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt2.errors import UserError
from fastgpt2.kernels import linear
from fastgpt2.plain import obstacle

# PEFT's default for a GPT-2, too
TARGETS = ("c_attn",)


@dataclass(frozen=True)
class LoRASettings:
    """What a model's adapters are.

    Attributes:
        rank: R.
        alpha: the update is scaled by alpha / R.
        targets: names of the adapted layers, or the ends of their names.
        dropout: rate on the input of A while training.
        base: where the weights below the adapters came from, or None if unknown.
        base_sha256: sha256 of those weights.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float
    base: str | None
    base_sha256: str | None


class LoRALinear(nn.Linear):
    """A linear layer with an adapter: x W^T + b + (alpha / R) dropout(x) A^T B^T.

    Args:
        layer: the plain layer, whose parameters it takes over.
        rank: R.
        scale: alpha / R.
        dropout: rate on the input of A while training.
    """

    def __init__(self, layer: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        sizes = layer.in_features, layer.out_features
        super().__init__(*sizes, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.scale, self.dropout_p = scale, dropout
        C, F_ = sizes
        self.lora_A = nn.Parameter(layer.weight.new_empty(rank, C))
        self.lora_B = nn.Parameter(layer.weight.new_zeros(F_, rank))
        if not self.lora_A.is_meta:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., F), in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out = linear(x, self.weight.to(x.dtype), bias)
        low = linear(F.dropout(x, self.dropout_p, self.training), self.lora_A.to(x.dtype))
        return out + linear(low, self.lora_B.to(x.dtype)) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that computes the same: W + (alpha / R) B A, summed in fp32."""
        sizes = self.in_features, self.out_features
        layer = nn.Linear(*sizes, bias=self.bias is not None, device="meta")
        weight = merge_weights(self.weight, self.lora_A, self.lora_B, self.scale)
        layer.weight, layer.bias = nn.Parameter(weight.to(self.weight.dtype)), self.bias
        return layer.train(self.training)


def merge_weights(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A, (F, C) in fp32.

    Args:
        weight: W, (F, C).
        a: A, (R, C).
        b: B, (F, R).
        scale: alpha / R.
    """
    return weight.float() + (b.float() @ a.float()) * scale


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    targets: tuple[str, ...] = TARGETS,
    dropout: float = 0.0,
    base: str | None = None,
    base_sha256: str | None = None,
) -> None:
    """Give linear layers of a GPT's blocks adapters, in place; only these are trained then.

    A is drawn from PyTorch's generator, uniform in 1 / sqrt(C); B is zero.

    Args:
        model: a GPT.
        rank: R, 1 or more.
        alpha: the update is scaled by alpha / R; None is R.
        targets: ``c_attn``, ``c_proj``, ``c_fc``, or longer: ``mlp.c_proj``, ``h.0.attn.c_attn``.
        dropout: rate on the input of A while training.
        base: where the model's weights came from; an adapter's file names it.
        base_sha256: sha256 of these weights, which is compared when the file is opened.

    Raises:
        UserError: a value is out of its range, a target matches no layer, a layer is not plain, or
            the model has adapters already.
    """
    alpha = float(rank) if alpha is None else alpha
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"LoRA: rank must be an integer of 1 or more, got {rank!r}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"LoRA: alpha must be greater than 0, got {alpha!r}")
    if not 0 <= dropout < 1:
        raise UserError(f"LoRA: dropout must be in [0, 1), got {dropout!r}")
    if settings_of(model) is not None:
        raise UserError("LoRA: the model has adapters already; merge_lora(model) first")
    layers = dict(model.named_modules())
    # the head is the token embedding
    known = [name for name, x in layers.items() if isinstance(x, nn.Linear) and name != "lm_head"]
    chosen = [name for name in known if any(_matches(name, target) for target in targets)]
    for target in targets:
        if not any(_matches(name, target) for name in known):
            ends = sorted({name.rpartition(".")[2] for name in known})
            # a quantized model has none
            there = ", ".join(ends) or "no linear layers"
            raise UserError(f"LoRA: no layer is called {target!r}; there are {there}")
    if not chosen:
        raise UserError("LoRA: give a layer to adapt, such as c_attn")
    for name in chosen:
        if reason := obstacle(layers[name], nn.Linear):
            raise UserError(f"LoRA: {name} cannot be adapted: {reason}")
    model.requires_grad_(False)
    for name in chosen:
        adapted = LoRALinear(_linear(layers[name]), rank, alpha / rank, dropout)
        _replace(layers, name, adapted)
    set_settings(model, LoRASettings(rank, alpha, tuple(targets), dropout, base, base_sha256))


def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the weights, in place: a plain GPT again, all of it trainable.

    Args:
        model: a GPT with adapters.

    Raises:
        UserError: it has none.
    """
    if settings_of(model) is None:
        raise UserError("LoRA: the model has no adapters")
    layers = dict(model.named_modules())
    for name, layer in layers.items():
        if isinstance(layer, LoRALinear):
            _replace(layers, name, layer.merged())
    set_settings(model, None)
    model.requires_grad_(True)


def settings_of(model: nn.Module) -> LoRASettings | None:
    """The description of a GPT's adapters, or None if it has none."""
    found: LoRASettings | None = getattr(model, "lora", None)
    return found


def set_settings(model: Any, settings: LoRASettings | None) -> None:
    """Store the description of a GPT's adapters in it."""
    model.lora = settings


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name."""
    return {name: x for name, x in model.named_modules() if isinstance(x, LoRALinear)}


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _linear(layer: nn.Module) -> nn.Linear:
    assert isinstance(layer, nn.Linear)
    return layer


def _replace(layers: dict[str, nn.Module], name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(layers[parent], child, new)
