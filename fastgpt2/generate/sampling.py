"""From logits to the next token."""

import torch
from torch import Tensor


def next_token(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token from softmax(logits / temperature), or take the best one at temperature 0.

    Args:
        logits: (B, V).
        temperature: below 1 sharper, above 1 flatter; 0 is greedy.
        top_k: only the k most likely tokens can be drawn.
        generator: source of randomness; None is PyTorch's default one.

    Returns:
        (B, 1) int64.

    Raises:
        ValueError: temperature is negative or top_k below 1.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    # with the largest at 0, a temperature near 0 makes the others -inf and nothing NaN
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth_best = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth_best, -torch.inf)
    return torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)
