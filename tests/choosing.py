"""A token from logits, as the plainest form of decoding takes it."""

import torch
from torch import Tensor

from fastgpt2.generate.sampling import Sampling, draw


def next_token(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(B, V) -> (B, 1): drawn by the package's parts, or the best one at temperature 0."""
    sampling = Sampling(temperature, top_k)
    if sampling.is_greedy:
        return logits.argmax(dim=-1, keepdim=True)
    # no processor here reads the tokens so far
    return draw(sampling.process(logits, logits), generator)
