"""Models of toy size, with weights that hide nothing."""

from typing import Any

import torch
from torch import Tensor

from fastgpt2.config import GPTConfig
from fastgpt2.model import GPT

TINY = dict(n_layer=2, n_head=4, n_embd=48, block_size=16, vocab_size=61)


def tiny_config(**fields: Any) -> GPTConfig:
    """2 layers, 4 heads of 12, 16 positions, 61 tokens."""
    return GPTConfig(**(TINY | fields))


def tiny_gpt(seed: int = 0, **fields: Any) -> GPT:
    """A model in which no LayerNorm is the identity and no bias is zero."""
    torch.manual_seed(seed)
    model = GPT(tiny_config(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.transformer.wte.weight[model.config.vocab_size :] = 0.0
    return model


def tiny_batch(B: int = 3, T: int = 16, V: int = 61, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (B, T) each, with two targets of each kind that is ignored."""
    generator = torch.Generator().manual_seed(seed)
    idx, targets = torch.randint(V, (2, B, T), generator=generator)
    targets[0, 1] = targets[-1, -1] = -1
    targets[0, 2] = targets[-1, 0] = -100
    return idx, targets


def gradients(model: GPT, idx: Tensor, targets: Tensor, **options: Any) -> dict[str, Tensor]:
    """The loss, and its gradient by every parameter's name."""
    model.zero_grad()
    loss = model(idx, targets, **options)[1]
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | grads


def assert_rms_within(
    actual: dict[str, Tensor], eager: dict[str, Tensor], gold: dict[str, Tensor]
) -> None:
    """Each tensor errs, root mean square, at most twice as much as ``eager`` plus 2 roundings."""
    assert actual.keys() == eager.keys() == gold.keys()
    for name, truth in gold.items():
        rounding = 2.0 * torch.finfo(actual[name].dtype).eps * truth.square().mean().sqrt()
        error, eager_error = (
            (x[name].double() - truth).square().mean().sqrt() for x in (actual, eager)
        )
        limit = 2.0 * eager_error + rounding
        assert error <= limit, f"{name}: rms error {error:.3g} over the budget {limit:.3g}"
