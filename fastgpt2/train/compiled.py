"""What is compiled before the first step: kernels, and the model where ``torch.compile`` can."""

from collections.abc import Callable
from typing import Any

import torch

from fastgpt2.compiler import compiler_obstacle, failure
from fastgpt2.devices import autocast, rng_states, set_rng_states
from fastgpt2.kernels.ahead import compile_ahead
from fastgpt2.kernels.backend import Impl, resolve
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
    """The compiled model, if a forward and a backward pass of it succeed; else the model itself.

    Weights, gradients and random numbers do not change.

    Args:
        model: in training mode, on its device.
        batch_size: B of the micro-batches to come.
        dtype: dtype of the computation.
        notify: shows each decision in a line.
        eot: the id that ends a document, if documents will be packed into blocks.
    """
    device = model.lm_head.weight.device
    obstacle = compiler_obstacle(device)
    if obstacle is not None:
        notify(f"compile: {obstacle}; training without it")
        return model
    notify("compile: on; the first step takes a minute or so")
    forward = torch.compile(model, fullgraph=True, dynamic=False)
    try:
        try_out(model, forward, batch_size, dtype, eot)
    except Exception as error:
        notify(f"compile: failed ({failure(error)}); training without it")
        return model
    return forward


def compile_kernels(
    model: GPT,
    batch_size: int,
    dtype: torch.dtype,
    *,
    eot: int | None = None,
    jobs: int | None = None,
) -> int:
    """Compile the Triton kernels of a training step in parallel, before the first one needs them.

    Weights, gradients and random numbers do not change.

    Args:
        model: in training mode, on its device.
        batch_size: B of the micro-batches to come.
        dtype: dtype of the computation.
        eot: the id that ends a document, if documents will be packed into blocks.
        jobs: number of threads; None means one per core.

    Returns:
        How many binaries the step needs; 0 if it uses PyTorch's operators.
    """
    if resolve("train", model.config.impl, model.lm_head.weight) is not Impl.TRITON:
        return 0
    return compile_ahead(lambda: try_out(model, model, batch_size, dtype, eot), jobs)


def try_out(
    model: GPT,
    forward: Callable[..., Any],
    batch_size: int,
    dtype: torch.dtype,
    eot: int | None = None,
) -> None:
    """A forward and backward pass that leaves no gradients and does not change random numbers.

    Args:
        model: in training mode, on its device, without gradients.
        forward: the model, perhaps compiled.
        batch_size: B of the micro-batch, of block_size tokens each.
        dtype: dtype of the computation.
        eot: the id that ends a document, if documents are packed into blocks.
    """
    device = model.lm_head.weight.device
    random_numbers = rng_states(device)
    idx = torch.zeros(batch_size, model.config.block_size, dtype=torch.int64, device=device)
    try:
        with autocast(device, dtype):
            loss = (forward if eot is None else packed(forward, eot))(idx, idx)[1]
        torch.autograd.backward(loss)
    finally:
        model.zero_grad(set_to_none=True)
        set_rng_states(random_numbers, device)
