"""``torch.compile`` for training, or one line that says why not."""

from collections.abc import Callable
from typing import Any

import torch

from fastgpt2.compiler import compiler_obstacle, failure
from fastgpt2.devices import autocast, rng_states, set_rng_states
from fastgpt2.model import GPT
from fastgpt2.text.packing import packed


def compiled(
    model: GPT,
    batch_size: int,
    dtype: torch.dtype,
    notify: Callable[[str], None],
    *,
    eot: int | None = None,
) -> Callable[..., Any]:
    """The compiled model, after a forward and backward pass that prove it; else the model itself.

    Weights, gradients and random numbers are left as they were.

    Args:
        model: in training mode, on its device.
        batch_size: B of the micro-batches to come.
        dtype: what it computes in.
        notify: shows what was decided, a line each.
        eot: the id that ends a document, where the blocks to come are of packed documents.
    """
    device = model.lm_head.weight.device
    obstacle = compiler_obstacle(device)
    if obstacle is not None:
        notify(f"compile: {obstacle}; training without it")
        return model
    notify("compile: on; the first step takes a minute or so")
    forward = torch.compile(model, fullgraph=True, dynamic=False)
    random_numbers = rng_states(device)
    idx = torch.zeros(batch_size, model.config.block_size, dtype=torch.int64, device=device)
    try:
        with autocast(device, dtype):
            loss = (forward if eot is None else packed(forward, eot))(idx, idx)[1]
        torch.autograd.backward(loss)
    except Exception as error:
        notify(f"compile: failed ({failure(error)}); training without it")
        return model
    finally:
        model.zero_grad(set_to_none=True)
        set_rng_states(random_numbers, device)
    return forward
