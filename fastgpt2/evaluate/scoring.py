"""Score each target token; no other module of the evaluation reads logits."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgpt2.devices import autocast
from fastgpt2.errors import UserError
from fastgpt2.model import GPT
from fastgpt2.plain import execution_device
from fastgpt2.text.packing import IGNORE_INDEX

# fp32 logits in memory at once: 64 MB
_CHUNK_ELEMENTS = 1 << 24


class TokenScores(NamedTuple):
    """Scores of M target tokens, in row order."""

    # -log p(target), in nats
    nll: NDArray[np.float64]
    # probability of the likeliest token
    confidence: NDArray[np.float64]
    # whether the likeliest token is the target
    correct: NDArray[np.bool_]


@torch.no_grad()
def score(model: GPT, idx: Tensor, targets: Tensor, dtype: torch.dtype) -> TokenScores:
    """Score every target that is not ignored; logits are computed only for these.

    Args:
        model: in evaluation mode, fp32 weights.
        idx: (B, T) token ids.
        targets: (B, T) token ids; -100 is ignored.
        dtype: compute dtype; log-softmax is in fp32.

    Raises:
        UserError: a loss is not finite.
    """
    device = execution_device(model.transformer.wpe)
    with autocast(device, dtype):
        hidden = model.hidden_states(idx.to(device))
    targets = targets.to(device)
    kept = targets != IGNORE_INDEX
    rows, wanted = hidden[kept], targets[kept]
    size = max(1, _CHUNK_ELEMENTS // model.config.padded_vocab_size)
    parts: list[Tensor] = []
    for start in range(0, len(rows), size):
        target = wanted[start : start + size]
        logits = model.lm_head(rows[start : start + size])[:, : model.config.vocab_size].float()
        lse = logits.logsumexp(dim=-1)
        top, likeliest = logits.max(dim=-1)
        nll = lse - logits.gather(1, target[:, None])[:, 0]
        parts.append(torch.stack([nll, (top - lse).exp(), likeliest == target]))
    # one transfer for all three
    nll, confidence, correct = torch.cat(parts, dim=1).cpu().double().numpy()
    if not np.isfinite(nll).all():
        raise UserError("the model's loss is not finite: damaged weights, or too large for fp16")
    return TokenScores(nll, confidence, correct.astype(bool))
