"""The memory of a training step: its parts, its peak, and the micro-batch that fits.

The peak is the largest over the stages of a step: the loss, the backward pass of the last block, of
the first block, and the update. The memory of a stage is counted in tensors of the model's shapes,
as the kernels keep them. Letters: N tokens per micro-batch, C width, T context, H heads, L layers,
V padded vocabulary; e bytes per element in the dtype of the computation.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fastgpt2 import distributed
from fastgpt2.devices import device_kind, release_gpu_memory, spare_gpu_memory
from fastgpt2.errors import UserError
from fastgpt2.kernels.linear_cross_entropy import TORCH_CHUNK_BYTES, TRITON_CHUNK_BYTES
from fastgpt2.layers import Block
from fastgpt2.model import GPT
from fastgpt2.train.compiled import try_out
from fastgpt2.train.host_memory import free_on_host
from fastgpt2.train.optimizers import moment_bytes, update_bytes
from fastgpt2.train.parallel import own

# queries of a block of the CPU's attention in bf16, and logits of a tile of its loss, at most
_QUERIES, _TILE = 256, 2**20
# the share of the free memory that the estimate of a step may reach
SHARE = 0.85
# on the processor a process takes more than its tensors: the heap has gaps between buffers of
# different sizes, and libraries have buffers of their own
HEAP, LIBRARIES = 1.4, 100 * 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes of one process while it trains.

    Attributes:
        weights: in fp32.
        gradients: in fp32, when all are there.
        moments: the optimizer's, in fp32.
        activations: kept from the forward pass for the backward pass.
        loss: one chunk of logits and what is computed from it.
        peak: the largest sum at one time.
        copy: of the weights and moments, in the host's memory while a checkpoint is written.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    loss: int
    peak: int
    copy: int


@dataclass(frozen=True)
class _Layer:
    """Bytes of one block: its backward pass needs ``full``, of which ``kept`` is saved for it."""

    full: float
    kept: float
    mlp: float
    attention: float
    gradients: float


def _keeps_input(layer: nn.Module) -> bool:
    """Whether the backward pass needs what a linear layer read: a matrix of it is trained."""
    return any(p.requires_grad for p in layer.parameters() if p.dim() == 2)


def _layer(model: GPT, rows: int, dtype: torch.dtype, gradients: float, *, pack: bool) -> _Layer:
    config, e = model.config, dtype.itemsize
    C, T, H = config.n_embd, config.block_size, config.n_head
    width = float(rows * T * C * e)
    scores = float(rows * H * T * T)
    triton = device_kind(model.lm_head.weight.device).cuda
    # copies of attention's and the MLP's weights in the dtype of the computation, if it is not fp32
    copy = C * C * e * (e != 4)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    # the last one is trained where any is
    fc, proj = blocks[-1].mlp.c_fc, blocks[-1].mlp.c_proj
    # norm 1, qkv 3, attention 1, stream 2, norm 1; in the MLP its pre-activation, and its GELU
    own = (7 + _keeps_input(fc)) * width + 4 * copy
    inner = (4 if triton or not _keeps_input(proj) else 8) * width + 8 * copy
    if config.resid_p > 0 and not triton:
        own += 2 * rows * T * C * 4
    if config.attn_p > 0:
        own += scores / 8 if triton else 12 * scores
    # gradients of the hidden layer before and after the GELU, its output on a GPU; the stream's;
    # and of the weights
    weight = 4 * C * C * 4
    mlp = (13 if triton else 5) * width + weight * proj.weight.requires_grad
    attention = (6 if triton else 11) * width
    attention += weight * (proj.weight.requires_grad + fc.weight.requires_grad)
    if not triton and config.attn_p == 0:
        if pack:
            # what each token sees, added to the scores, and the output without blind tokens
            own += rows * T * T * e + width
        elif e == 2:
            attention += 3 * scores / T * min(T, _QUERIES) * e
    kept = full = own + inner
    if model.transformer.remat_blocks:
        kept = width
    elif blocks[0].remat_mlp:
        kept = own
    return _Layer(full, kept, mlp, attention - inner, gradients)


def estimate(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    dtype: torch.dtype,
    *,
    grad_accum: int = 1,
    pack: bool = False,
) -> Memory:
    """The memory of each process, from shapes alone.

    Args:
        model: on its device; sharded where it will be.
        optimizer: of its parameters; its moments need not exist yet.
        batch_size: B, sequences per micro-batch.
        dtype: dtype of the computation.
        grad_accum: micro-batches per step.
        pack: whether attention is confined to the documents of a block.
    """
    config, e = model.config, dtype.itemsize
    C, L, V = config.n_embd, config.n_layer, config.padded_vocab_size
    N = batch_size * config.block_size
    host = device_kind(model.lm_head.weight.device).host
    sharded = isinstance(model, FSDPModule)
    ranks = distributed.world_size()
    moments = moment_bytes(optimizer)
    weights = 4 * sum(p.numel() for p in model.parameters())
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    blocks = 4 * sum(p.numel() for p in model.transformer.h.parameters() if p.requires_grad)
    # the checkpoint of a model with adapters has only these
    stored = weights if model.lora is None else trained
    layer = _layer(model, batch_size, dtype, blocks / L, pack=pack)
    # the residual stream before the first block and after the last one, the gradient of the latter
    base = 3 * N * C * e + (4 * N * C if config.embd_p > 0 and host else 0)
    activations = base + L * layer.kept
    chunk = min(N * V * e, TORCH_CHUNK_BYTES if host else TRITON_CHUNK_BYTES)
    tile = min(chunk // e, _TILE) if host else 0
    # a tile's probabilities, and its logits in fp32 and without the padding's, if they were not so
    copies = 4 + 4 * (e != 4 or config.vocab_size != V)
    loss = chunk + tile * copies + V * C * (e if e != 4 else 0)
    head = 4 * V * C * model.lm_head.weight.requires_grad
    stages = [activations + loss + head]
    # the last block's backward pass, and the first one's
    for waiting in (L, 1):
        held = base + head + waiting * layer.kept + (L - waiting) * layer.gradients
        held += layer.full - layer.kept
        stages += [held + layer.mlp, held + layer.attention]
    shared = ranks if sharded else 1
    gradients, passes = trained / shared, max(stages)
    if sharded:
        # embeddings and two blocks are whole, and a block's gradient before it is shared out
        whole = V * C + config.block_size * C + 3 * blocks / L / 4
        passes += e * whole + (trained if grad_accum > 1 else 0)
    elif ranks > 1:
        # DDP keeps its buckets all the time
        passes += trained - head
    peak = max(passes, gradients + update_bytes(optimizer)) + (weights + moments) / shared
    # only the first process copies a replicated model; a part of a sharded one is put into a file's
    # bytes before these are written, the weights and then the moments
    copy = (stored + moments + (max(stored, moments) if sharded else 0)) / shared
    return Memory(
        round(weights / shared),
        round(gradients),
        round(moments / shared),
        round(activations),
        round(loss),
        round(peak),
        round(copy),
    )


def available(device: torch.device) -> int:
    """Bytes that this process may still take on ``device``.

    Args:
        device: a GPU, or the processor, whose memory the processes of a machine share.

    Raises:
        UserError: the system does not tell.
    """
    if device_kind(device).cuda:
        return spare_gpu_memory(device)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = free_on_host(processes) if device_kind(device).host else None
    if free is None:
        raise UserError("--batch-size auto: this system does not say how much memory is free")
    return free


def largest_batch(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    sequences: int,
    dtype: torch.dtype,
    notify: Callable[[str], None],
    *,
    pack: bool = False,
) -> int:
    """The largest micro-batch that fits, of those that divide ``sequences``.

    The estimate chooses it. On a GPU a forward and a backward pass try it; if memory does not
    suffice, the next smaller one is tried. All processes call it, and get the same number.

    Args:
        model: in training mode, on its device.
        optimizer: of its parameters, before its first step.
        sequences: sequences per step and process.
        dtype: dtype of the computation.
        notify: shows a line.
        pack: whether attention is confined to the documents of a block.

    Raises:
        UserError: one sequence does not fit.
    """
    device, moments = model.lm_head.weight.device, moment_bytes(optimizer)
    held = sum(own(p).nbytes for p in model.parameters())
    # of the process that has the least
    free = int(SHARE * -distributed.all_max(-available(device) - held)[0])
    sizes = [size for size in range(sequences, 0, -1) if sequences % size == 0]
    needs = {
        size: estimate(model, optimizer, size, dtype, grad_accum=sequences // size, pack=pack)
        for size in sizes
    }
    # on the processor, what a checkpoint is written from lies beside the step
    host = device_kind(device).host
    peaks = {
        size: int(HEAP * (need.peak + need.copy)) + LIBRARIES if host else need.peak
        for size, need in needs.items()
    }
    chosen = next((i for i, size in enumerate(sizes) if peaks[size] <= free), len(sizes))
    # the ranks of a sharded model would wait for one that has run out of memory
    tries = device_kind(device).cuda and not isinstance(model, FSDPModule)
    while tries and chosen < len(sizes):
        (failed,) = distributed.all_max(int(not _fits(model, moments, sizes[chosen], dtype)))
        if not failed:
            break
        chosen += 1
    if chosen == len(sizes):
        raise UserError(
            f"--batch-size auto: one sequence takes about {peaks[1] / 1e9:.3g} GB, and "
            f"{free / 1e9:.3g} GB are free; --remat block and --shard take less"
        )
    size = sizes[chosen]
    notify(f"batch size: {size} x {sequences // size} sequences; {free / 1e9:.3g} GB are free")
    return size


def _fits(model: GPT, moments: int, batch_size: int, dtype: torch.dtype) -> bool:
    """Whether a step's forward and backward pass fit into memory with the optimizer's moments."""
    try:
        filler = torch.empty(moments, dtype=torch.uint8, device=model.lm_head.weight.device)
        try_out(model, model, batch_size, dtype)
        del filler
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        release_gpu_memory()
