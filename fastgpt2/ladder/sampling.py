"""Rung 11: which token comes next: the likeliest, or a draw that temperature and top-k shape."""

import torch
from torch import Tensor, nn

from fastgpt2.errors import UserError


@torch.no_grad()
def generate_text_simple(
    model: nn.Module, idx: Tensor, max_new_tokens: int, context_size: int
) -> Tensor:
    """Append the likeliest token, ``max_new_tokens`` times: (B, T) -> (B, T + max_new_tokens).

    The model sees the last ``context_size`` tokens. Put it in evaluation mode first.
    """
    for _ in range(max_new_tokens):
        logits = model(idx[:, -context_size:])[:, -1]
        idx = torch.cat([idx, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return idx


def next_token_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None
) -> Tensor:
    """softmax(logits / temperature), (..., V), over the ``top_k`` largest logits alone.

    A low temperature sharpens, a high one flattens; at 0 the likeliest token has all of it.

    Raises:
        UserError: temperature is negative or top_k below 1.
    """
    if temperature < 0:
        raise UserError(f"temperature must be 0 or more, got {temperature}")
    if top_k is not None:
        if top_k < 1:
            raise UserError(f"top_k must be 1 or more, got {top_k}")
        kth_best = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth_best, -torch.inf)
    if temperature == 0:
        return nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
    # with the largest at 0, a tiny temperature makes the others -inf and nothing infinite
    return torch.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)


@torch.no_grad()
def generate(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    context_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
) -> Tensor:
    """Append drawn tokens: (B, T) -> (B, at most T + max_new_tokens).

    Args:
        model: gives logits (B, T, V); put it in evaluation mode first.
        idx: (B, T) token ids.
        max_new_tokens: how many tokens to append.
        context_size: how many of the last tokens the model sees.
        temperature: of the distribution; 0 takes the likeliest token, as ``generate_text_simple``.
        top_k: draw from the k likeliest tokens only.
        eos_id: id that ends a text: a row that drew it is filled up with it, and generation stops
            (without appending it once more) as soon as all rows have ended.
    """
    ended = torch.zeros(idx.shape[0], 1, dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        logits = model(idx[:, -context_size:])[:, -1]
        if temperature == 0:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            token = torch.multinomial(next_token_probabilities(logits, temperature, top_k), 1)
        if eos_id is not None:
            token = token.masked_fill(ended, eos_id)
            ended = ended | (token == eos_id)
            if ended.all():
                break
        idx = torch.cat([idx, token], dim=1)
    return idx
