"""``--batch-size auto``: the configuration with the micro-batch that fits, as a number."""

from collections.abc import Callable
from dataclasses import replace

import torch

from fastgpt2 import distributed
from fastgpt2.model import GPT
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.memory import largest_batch


def fitted(
    config: TrainConfig,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype,
    notify: Callable[[str], None],
) -> TrainConfig:
    """The configuration with the largest micro-batch that fits, and as many tokens per step.

    All processes call it, and get the same result.

    Args:
        config: its ``batch_size`` and ``grad_accum`` give the sequences of a step. One without
            ``auto_batch_size`` is returned unchanged.
        model: in training mode, on its device; already sharded if it will be.
        optimizer: the optimizer of its parameters, before the first step.
        dtype: dtype of the computation.
        notify: shows a line.

    Raises:
        UserError: one sequence does not fit, or the sequences of a step cannot be dealt out.
    """
    if not config.auto_batch_size:
        return config
    ranks = distributed.world_size()
    batch_size, grad_accum = config.split(ranks)
    sequences = batch_size * grad_accum
    size = largest_batch(model, optimizer, sequences, dtype, notify, pack=config.pack)
    return replace(
        config,
        auto_batch_size=False,
        batch_size=size,
        grad_accum=sequences // size,
        ranks=ranks,
    )
