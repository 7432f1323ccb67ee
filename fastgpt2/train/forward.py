"""The forward pass of a run: compiled, joined with those of other processes, and packed."""

from collections.abc import Callable

import torch

from fastgpt2 import distributed
from fastgpt2.model import GPT
from fastgpt2.text.packing import packed
from fastgpt2.train.compiled import compile_kernels, compiled
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.parallel import Accumulate, Forward, joined


def forward_pass(
    forward: Forward,
    model: GPT,
    config: TrainConfig,
    batch_size: int,
    dtype: torch.dtype,
    notify: Callable[[str], None],
    *,
    eot: int | None,
) -> tuple[Forward, Accumulate]:
    """What the training step calls, and the context for each micro-batch; all processes call it.

    Args:
        forward: what the step calls now: the model, or what stands for it.
        model: in training mode, on its device; sharded where it will be.
        config: of the run.
        batch_size: B of the micro-batches to come.
        dtype: what the model computes in.
        notify: shows a line.
        eot: the id that ends a document, where the blocks to come are of packed documents.
    """
    compile_kernels(model, batch_size, dtype, eot=eot)
    if config.compile and config.shard and distributed.world_size() > 1:
        notify("compile: not with --shard; training without it")
    elif config.compile:
        forward = compiled(model, batch_size, dtype, notify, eot=eot)
    forward, accumulate = joined(model, forward)
    return forward if eot is None else packed(forward, eot), accumulate
