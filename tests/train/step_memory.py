"""The memory of a training step, by PyTorch's profiler."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt2 import distributed
from fastgpt2.config import GPTConfig
from fastgpt2.model import GPT
from fastgpt2.train.memory import estimate
from fastgpt2.train.optimizers import build_optimizer
from fastgpt2.train.parallel import joined, own, shard
from fastgpt2.train.step import TrainingStep
from tests.memory import profiled_peak
from tests.train.tiny_run import tiny_train_config

SMALL: dict[str, Any] = dict(
    n_layer=3, n_head=2, n_embd=32, block_size=64, vocab_size=300, dropout=0.0
)


def measured(step: TrainingStep, batches: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Bytes at the peak of a step: what was there before it, and what the profiler adds."""
    step(batches, lr=1e-3)
    step.optimizer.zero_grad(set_to_none=True)
    moments = [t for s in step.optimizer.state.values() for t in s.values() if t.dim()]
    before = sum(own(t).nbytes for t in (*moments, *step.model.parameters()))
    return before + profiled_peak(lambda: step(batches, lr=1e-3))


def compared(
    *, sharded: bool, optimizer: str, grad_accum: int, rows: int = 4, **shape: Any
) -> dict[str, int]:
    """The peak and the estimate of a process; all processes call it."""
    config = GPTConfig(**(SMALL | shape))
    model = GPT(config)
    if sharded:
        shard(model, torch.float32)
    made = build_optimizer(model, tiny_train_config(Path(), optimizer=optimizer))
    forward, accumulate = joined(model, model)
    step = TrainingStep(
        model, made, dtype=torch.float32, grad_clip=1.0, forward=forward, poll=lambda: None
    )
    step.accumulate = accumulate
    idx = torch.randint(config.vocab_size, (rows, config.block_size))
    expected = estimate(model, made, rows, torch.float32, grad_accum=grad_accum).peak
    return {"measured": measured(step, [(idx, idx)] * grad_accum), "estimate": expected}


def compared_in_ranks() -> list[dict[str, int]]:
    """For the forms of two processes."""
    with distributed.process_group():
        return [
            compared(sharded=sharded, optimizer=optimizer, grad_accum=grad_accum, **shape)
            for sharded, optimizer, grad_accum, shape in (
                (False, "adamw", 2, {}),
                (False, "muon", 1, {"n_embd": 64}),
                (True, "adamw", 1, {}),
                (True, "adamw", 2, {"n_embd": 64}),
                (True, "muon", 1, {"n_embd": 64}),
            )
        ]
