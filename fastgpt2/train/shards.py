"""The checkpoint of a sharded model: each process writes its own part of every tensor."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save

from fastgpt2 import distributed, runs
from fastgpt2.cli import exit_code
from fastgpt2.errors import EndedElsewhere
from fastgpt2.weights.shards import WEIGHTS


@cache
def _group_beside(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """What the threads that write agree through, beside the group of the training."""
    beside: dist.ProcessGroup = dist.new_group(backend="gloo")
    return beside


def staged_shards(
    tensors: Mapping[str, Tensor], *, on_cuda: bool
) -> Callable[[Path], dict[str, str]]:
    """Copy this process's parts into the host's memory; all processes call it.

    Args:
        tensors: DTensors, and plain tensors that are the same on all processes.
        on_cuda: the parts are on a GPU.

    Returns:
        What writes the copies into ``FOLDER/shards``, and has no digests of the files. All
        processes call it, in any thread; it ends when the parts of all are on the disk. It raises
        the first failure on the process that had it, and ``EndedElsewhere`` on the others.
    """
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=on_cuda,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=on_cuda,
        )
    )
    copies = stager.stage({name: tensor.detach() for name, tensor in tensors.items()})
    assert isinstance(copies, dict) and dist.group.WORLD is not None
    group = _group_beside(dist.group.WORLD)

    def write(folder: Path) -> dict[str, str]:
        # weights in files of their own
        files = {name: 1 if name.startswith(WEIGHTS) else 2 for name in copies}
        writer = HuggingFaceStorageWriter(str(folder / runs.SHARDS), files, save_distributed=True)
        try:
            save(copies, storage_writer=writer, process_group=group)
        except CheckpointException as error:
            first = min(error.failures)
            reason = error.failures[first][0]
            if first != distributed.rank() and isinstance(reason, Exception):
                raise EndedElsewhere(exit_code(reason)) from None
            raise reason from None
        return {}

    return write
