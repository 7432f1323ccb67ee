"""Activations that are recomputed in the backward pass instead of kept from the forward pass."""

from fastgpt2.layers import Block
from fastgpt2.model import GPT

# from the most memory to the least
REMATS = ("none", "mlp", "block")


def set_remat(model: GPT, kind: str) -> None:
    """From now on, training recomputes the model's MLPs, or whole blocks, in the backward pass.

    Args:
        model: in any mode; only training is changed.
        kind: one of ``REMATS``.
    """
    model.transformer.remat_blocks = kind == "block"
    for module in model.modules():
        if isinstance(module, Block):
            module.remat_mlp = kind == "mlp"
