"""Loss over the whole validation split."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastgpt2 import distributed
from fastgpt2.devices import autocast
from fastgpt2.model import GPT
from fastgpt2.text.dataset import Dataset
from fastgpt2.text.loaders import iter_eval_batches
from fastgpt2.text.packing import inside_documents, packed
from fastgpt2.units import perplexity

# the fewest tokens per batch: without gradients they fit wherever training does
EVAL_TOKENS = 4096


@dataclass(frozen=True)
class Validation:
    """Mean cross-entropy in nats per token, and the same in other units."""

    loss: float
    targets: int
    text_bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite if that overflows."""
        return perplexity(self.loss)

    @property
    def nats_per_byte(self) -> float:
        """Loss per UTF-8 byte of the text, comparable between tokenizers.

        NaN if the ids have no text.
        """
        if not self.text_bytes:
            return math.nan
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
    dtype: torch.dtype,
    poll: Callable[[], None],
    eot: int | None = None,
) -> Validation | None:
    """Score every validation token once, in blocks of the model's block_size.

    Several processes share the batches, and each gets the result of all.

    Args:
        model: scored in evaluation mode, then set back to its previous mode.
        dataset: the dataset whose validation split is scored.
        batch_size: rows of block_size tokens per batch.
        dtype: autocast's dtype for the computation; losses are summed in fp64.
        poll: called before each batch, by all processes; an exception of it ends the scoring.
        eot: the id that ends a document, if each document of a block is scored alone.

    Returns:
        The loss in nats per token; None if the data has no validation split.
    """
    if dataset.val is None:
        return None
    was_training = model.training
    model.eval()
    device, block_size = model.lm_head.weight.device, model.config.block_size
    forward = model if eot is None else packed(model, eot)
    losses: list[Tensor] = []
    counts: list[int] = []
    rank, ranks = distributed.rank(), distributed.world_size()
    batches = iter_eval_batches(dataset.val, block_size, batch_size, rank=rank, world_size=ranks)
    total = math.ceil((len(dataset.val) - 1) / (ranks * batch_size * block_size))
    # shown only on a terminal, and only if it takes long
    disable = True if rank else None
    with tqdm(
        desc="evaluating", total=total, unit="batch", leave=False, delay=2.0, disable=disable
    ) as bar:
        try:
            # data that one process cannot read end the scoring on all
            while (batch := distributed.together(lambda: next(batches, None))) is not None:
                poll()
                idx, targets = batch
                if eot is not None:
                    targets = inside_documents(idx, targets, eot)
                with autocast(device, dtype):
                    loss = forward(idx.to(device), targets.to(device), fused_loss=True)[1]
                losses.append(loss)
                counts.append(int((targets >= 0).sum()))
                bar.update()
        finally:
            model.train(was_training)
    # weighted by count, in fp64, with one transfer at the end
    weights = torch.tensor(counts, dtype=torch.float64)
    # a batch without a target has a mean of NaN
    sums = torch.where(weights > 0, torch.stack(losses).cpu().double() * weights, 0.0).sum()
    nats, scored = distributed.all_sum(np.array([sums.item(), weights.sum().item()]))
    text_bytes = dataset.val_bytes - (0 if eot is None else dataset.first_bytes)
    return Validation(float(nats / scored), int(scored), text_bytes)
