"""Rung 9: everything else in a transformer block, and why it has shortcuts."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt2.ladder.multi_head import MultiHeadAttention


class LayerNorm(nn.Module):
    """y = scale * (x - mean) / sqrt(var + eps) + shift, over the last dimension.

    The variance is the biased one, divided by C, as in GPT-2. Ba, Kiros and Hinton, "Layer
    Normalization", 2016.
    """

    eps = 1e-5

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        mean = x.mean(dim=-1, keepdim=True)
        var = x.var(dim=-1, keepdim=True, correction=0)
        return self.scale * (x - mean) / torch.sqrt(var + self.eps) + self.shift


class GELU(nn.Module):
    """y = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), the form GPT-2 was trained with.

    Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return 0.5 * x * (1 + torch.tanh(inner))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, four times as wide inside.

    Args:
        cfg: the model's configuration; ``emb_dim`` is read.
    """

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        C = cfg["emb_dim"]
        self.layers = nn.Sequential(nn.Linear(C, 4 * C), GELU(), nn.Linear(4 * C, C))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        y: Tensor = self.layers(x)
        return y


class DeepNetwork(nn.Module):
    """Linear layers with GELUs, with or without shortcuts: the vanishing gradient's demonstration.

    A shortcut adds a layer's input to its output where the two have the same width, so that the
    gradient has a path around it.

    Args:
        layer_sizes: width of the input, then of each layer.
        use_shortcut: whether to add the inputs.
    """

    def __init__(self, layer_sizes: Sequence[int], use_shortcut: bool) -> None:
        super().__init__()
        self.use_shortcut = use_shortcut
        self.layers = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(width, next_width), GELU())
                for width, next_width in pairwise(layer_sizes)
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, layer_sizes[0]) -> (B, layer_sizes[-1])."""
        for layer in self.layers:
            y = layer(x)
            x = x + y if self.use_shortcut and x.shape == y.shape else y
        return x


def mean_gradients(model: DeepNetwork, x: Tensor) -> list[float]:
    """Mean of |d loss / d weight| for each layer, the first layer first; the loss is mean(y^2)."""
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    gradients = torch.autograd.grad(model(x).square().mean(), weights)
    return [gradient.abs().mean().item() for gradient in gradients]


class TransformerBlock(nn.Module):
    """x + attention(norm1(x)), then x + feed_forward(norm2(x)), with dropout on what is added.

    Args:
        cfg: ``emb_dim, context_length, n_heads, drop_rate, qkv_bias``.
    """

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        self.att = MultiHeadAttention(
            d_in=cfg["emb_dim"],
            d_out=cfg["emb_dim"],
            context_length=cfg["context_length"],
            dropout=cfg["drop_rate"],
            num_heads=cfg["n_heads"],
            qkv_bias=cfg["qkv_bias"],
        )
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(cfg["emb_dim"])
        self.norm2 = LayerNorm(cfg["emb_dim"])
        self.drop_shortcut = nn.Dropout(cfg["drop_rate"])

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.drop_shortcut(self.att(self.norm1(x)))
        x = x + self.drop_shortcut(self.ff(self.norm2(x)))
        return x
