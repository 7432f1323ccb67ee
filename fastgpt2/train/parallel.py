"""One model on several processes: replicated by DDP, or sharded by FSDP2."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastgpt2 import distributed
from fastgpt2.devices import device_kind
from fastgpt2.errors import UserError
from fastgpt2.model import GPT

# one bucket per parameter: sums then do not depend on the order in which gradients arrive, which
# DDP learns in the first step after a start, so a resumed run gets the same bits
_CPU_BUCKET_MB = 1e-6

Forward = Callable[..., Any]
# makes the context of a micro-batch, given whether it is the last one of its step
Accumulate = Callable[[bool], AbstractContextManager[None]]


def alone(last: bool) -> AbstractContextManager[None]:
    """The context of a micro-batch with one process.

    Args:
        last: whether it is the last one of its step.
    """
    return nullcontext()


def shard(model: GPT, dtype: torch.dtype) -> None:
    """Give each process its part of every parameter: block by block, and then of the rest.

    Parameters become DTensors in fp32. They are gathered in ``dtype`` while they are computed with;
    gradients are summed in fp32.

    Args:
        model: the same on all processes, on its device.
        dtype: dtype that the model computes in.

    Raises:
        UserError: ``dtype`` is fp16, whose loss scale would need an agreement in each step; or the
            model has adapters, which are small.
    """
    if model.lora is not None:
        raise UserError("--shard: a run with --lora is replicated, its adapters are small")
    if dtype == torch.float16:
        raise UserError("--shard: computes in bf16 or fp32, not in fp16")
    mesh = init_device_mesh(model.lm_head.weight.device.type, (distributed.world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        # the residual stream may be kept in fp32
        cast_forward_inputs=False,
    )
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def joined(model: GPT, forward: Forward) -> tuple[Forward, Accumulate]:
    """The forward pass whose backward pass leaves the mean gradient of all processes.

    Args:
        model: the weights: the same on all processes, or sharded.
        forward: the model, or the model compiled.

    Returns:
        The forward pass, and the context for each micro-batch: only the last one of a step
        exchanges gradients.
    """
    if distributed.world_size() == 1:
        return forward, alone
    if isinstance(model, FSDPModule):
        sharded = model

        def accumulate_shards(last: bool) -> AbstractContextManager[None]:
            sharded.set_requires_gradient_sync(last)
            return nullcontext()

        return forward, accumulate_shards
    assert isinstance(forward, nn.Module)
    on_cpu = device_kind(model.lm_head.weight.device).host
    if on_cpu and forward is not model:
        # else a compiled model is cut where a bucket ends, here at each parameter
        torch._dynamo.config.optimize_ddp = False
    ddp = DistributedDataParallel(
        forward,
        bucket_cap_mb=_CPU_BUCKET_MB if on_cpu else None,
        gradient_as_bucket_view=True,
    )

    def accumulate(last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else ddp.no_sync()

    return ddp, accumulate


def seed_for_rank(seed: int, step: int) -> None:
    """Give each process but the first random numbers of its own, from ``step`` on.

    Args:
        seed: the run's seed; the first process goes on with it.
        step: optimizer steps taken.
    """
    if distributed.rank():
        words = np.random.SeedSequence([seed, distributed.rank(), step])
        torch.manual_seed(int(words.generate_state(1, np.uint64)[0]) >> 1)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all processes call it.

    Args:
        tensor: plain, or a DTensor.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory.

    Args:
        tensor: plain, or a DTensor.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_like(parameter: Tensor, part: Tensor) -> Tensor:
    """The whole of a tensor that is sharded as ``parameter`` is; all processes call it.

    Args:
        parameter: plain, or a DTensor.
        part: this process's part.
    """
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    ).full_tensor()


def placed_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """``tensor``, which all processes have, sharded as ``parameter`` is.

    Args:
        parameter: plain, or a DTensor.
        tensor: a tensor of its shape.
    """
    if not isinstance(parameter, DTensor):
        return tensor
    # no process sends anything: each takes its part
    return distribute_tensor(
        tensor.contiguous(), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def reshard(model: nn.Module) -> None:
    """Free the parameters that a forward pass has gathered: the model's are shards again.

    Args:
        model: sharded, or plain.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_weights(model: GPT) -> dict[str, Tensor]:
    """The state dict of a model, sharded or plain, with whole tensors; all processes call it.

    Args:
        model: its vocabulary comes without padding, and its tied head once.
    """
    reshard(model)
    return {k: whole(v) for k, v in model.state_dict().items() if k != "lm_head.weight"}


def whole_model(model: GPT) -> GPT:
    """The model itself, or a plain copy if it is sharded; all processes call it.

    Args:
        model: sharded, or plain.
    """
    if not isinstance(model, FSDPModule):
        return model
    weights = whole_weights(model)
    with torch.device("meta"):
        copy = GPT(model.config)
    copy.load_state_dict(weights, assign=True)
    return copy
