"""Loss over the whole validation split."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from fastgpt2.model import GPT
from fastgpt2.text.dataset import Dataset
from fastgpt2.text.loaders import iter_eval_batches


@dataclass(frozen=True)
class Validation:
    """Mean cross-entropy in nats per token, and the same as people like to read it."""

    loss: float
    targets: int
    text_bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def nats_per_byte(self) -> float:
        """Loss a UTF-8 byte of the text, comparable between tokenizers."""
        return self.loss * self.targets / self.text_bytes

    @property
    def bits_per_byte(self) -> float:
        """``nats_per_byte`` in bits."""
        return self.nats_per_byte / math.log(2)


@torch.no_grad()
def validate(
    model: GPT,
    dataset: Dataset,
    *,
    batch_size: int,
    context: Callable[[], AbstractContextManager[None]],
    poll: Callable[[], None],
) -> Validation | None:
    """Score every validation token once, in blocks of the model's block_size.

    None where the data keeps no validation split.
    """
    if dataset.val is None:
        return None
    was_training = model.training
    model.eval()
    device = model.lm_head.weight.device
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    try:
        for idx, targets in iter_eval_batches(dataset.val, model.config.block_size, batch_size):
            poll()
            kept = int((targets >= 0).sum())
            with context():
                loss = model(idx.to(device), targets.to(device), fused_loss=True)[1]
            total += loss * kept
            count += kept
    finally:
        model.train(was_training)
    return Validation(total.item() / count, count, dataset.val_bytes)
