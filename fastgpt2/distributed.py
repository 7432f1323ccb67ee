"""The process group: rank, world size, who does what, and the sums over all processes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray


@contextmanager
def process_group() -> Iterator[None]:
    """The group of processes that torchrun has started; without torchrun, nothing.

    gloo on every device: all that travels are a few sums, which are on the CPU.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(count: int, batch_size: int) -> range:
    """Starts of this process's batches of ``batch_size``, out of ``count`` things."""
    return range(rank() * batch_size, count, world_size() * batch_size)


def all_sum(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of ``array`` over all processes, in fp64."""
    if world_size() == 1:
        return array
    total = torch.from_numpy(array.copy())
    dist.all_reduce(total)
    return total.numpy()


def gather(items: list[Any]) -> list[Any]:
    """The lists ``items`` of all processes, one after the other."""
    if world_size() == 1:
        return items
    lists: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]
