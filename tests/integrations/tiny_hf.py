"""Small GPT-2s of transformers and of ours with the same random weights, and comparisons."""

from typing import Any

import torch
import transformers
from torch import Tensor

import fastgpt2

VOCAB, PAD = 61, 60
ATOL = 1e-4


def config(**fields: Any) -> Any:
    """Two layers, two heads of size 12, no dropout."""
    options: dict[str, Any] = dict(
        vocab_size=VOCAB,
        n_embd=24,
        n_layer=2,
        n_head=2,
        n_positions=48,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        summary_first_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=PAD,
    )
    return transformers.GPT2Config(**(options | fields))


def randomised(model: Any, seed: int = 0) -> Any:
    """The model with weights large enough that every part of it shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def pair(**fields: Any) -> tuple[Any, Any]:
    """(theirs, ours): equal weights, evaluation mode."""
    theirs = randomised(transformers.GPT2LMHeadModel(config(**fields)))
    ours: Any = fastgpt2.GPT2LMHeadModel(config(**fields))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours.eval()


def tokens(B: int = 3, T: int = 9, seed: int = 1) -> Tensor:
    """(B, T) random ids, no padding among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, PAD, (B, T), generator=generator)


def padding(T: int, *kept: tuple[int, int]) -> Tensor:
    """A 2-D attention mask: row i keeps the positions [start, end) of ``kept[i]``."""
    mask = torch.zeros(len(kept), T, dtype=torch.long)
    for row, (start, end) in zip(mask, kept, strict=True):
        row[start:end] = 1
    return mask


def assert_close(ours: Any, theirs: Any, atol: float = ATOL) -> None:
    """Tensors, or tuples of them, equal to ``atol``, in dtype and shape exactly."""
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0.0)


def assert_gradient_close(ours: Tensor, theirs: Tensor) -> None:
    """As ``assert_close``, to ``ATOL`` of the largest element where that is above 1."""
    assert_close(ours, theirs, atol=ATOL * max(1.0, theirs.detach().abs().max().item()))


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of the parameters that have one."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
