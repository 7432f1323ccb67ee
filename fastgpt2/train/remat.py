"""Activations that are computed again in the backward pass, not kept from the forward pass."""

from fastgpt2.layers import Block
from fastgpt2.model import GPT

# from the most memory to the least
REMATS = ("none", "mlp", "block")


def set_remat(model: GPT, kind: str) -> None:
    """From now on, training computes the MLPs, or the whole blocks, of the model again.

    Args:
        model: in any mode; only training is changed.
        kind: one of ``REMATS``.
    """
    model.transformer.remat_blocks = kind == "block"
    for module in model.modules():
        if isinstance(module, Block):
            module.remat_mlp = kind == "mlp"
