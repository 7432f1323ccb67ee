"""The process group: rank, world size, who does what, and what all processes agree on."""

import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from fastgpt2.cli import exit_code
from fastgpt2.errors import EndedElsewhere, UserError

Result = TypeVar("Result")

_CPU = torch.device("cpu")


class _Progress:
    """How many times this process has reached a place where all agree, and when it last did."""

    count = 0
    moment = time.monotonic()


def _move_on() -> None:
    _Progress.count += 1
    _Progress.moment = time.monotonic()


def agreements() -> int:
    """How many times this process has reached a place where all processes agree on something."""
    return _Progress.count


def seconds_since_agreement() -> float:
    """Seconds since it last did."""
    return time.monotonic() - _Progress.moment


def leave_out(seconds: float) -> None:
    """Do not count a time in ``seconds_since_agreement``.

    Args:
        seconds: how long this process was stopped, as by Ctrl-Z.
    """
    _Progress.moment += seconds


@contextmanager
def process_group(device: str = "cpu", timeout: float | None = None) -> Iterator[None]:
    """The group of processes that torchrun has started; without torchrun, nothing.

    What processes agree on travels over gloo, on the CPU. Gradients on GPUs travel over NCCL.

    Args:
        device: type of the device whose tensors are summed; ``cuda`` adds NCCL.
        timeout: seconds that a process waits for the others; None means PyTorch's default.
    """
    if not is_launched() or dist.is_initialized():
        yield
        return
    options: dict[str, Any] = {} if timeout is None else {"timeout": timedelta(0, timeout)}
    if is_elastic():
        # torchrun keeps one store through restarts, with addresses of processes that have ended
        ranks = {"rank": launched_rank(), "world_size": launched_world_size()}
        options |= ranks | {"store": PrefixStore(f"fastgpt2/group/{attempt()}", job_store())}
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", **options)
    _move_on()
    yield
    # after an error the others may be gone, and the group could wait for them
    dist.destroy_process_group()


def is_launched() -> bool:
    """Whether torchrun, or a program like it, has started this process as one of several."""
    return "RANK" in os.environ


def is_elastic() -> bool:
    """Whether a torchrun keeps the store, which then outlives the processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def attempt() -> int:
    """How many times torchrun has restarted the processes of this job."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def job_store() -> Store:
    """A separate connection to the key-value store of the job."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store: Store = TCPStore(address, port, is_master=False, timeout=timedelta(minutes=5))
    return store


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launched_rank() -> int:
    """``rank()``, also before the process group exists."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """``world_size()``, also before the process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1")) if is_launched() else 1


def local_rank() -> int:
    """Number of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_device(name: str) -> str:
    """The device of this process: of several on one machine, each takes one GPU.

    Args:
        name: ``auto``, or a device's name.

    Returns:
        ``name``, with the GPU's number where it stands for one and several processes share them.

    Raises:
        UserError: there are fewer GPUs than processes on this machine, or all are to share one.
        EndedElsewhere: likewise, and another process says so.
    """
    if launched_world_size() == 1:
        return name
    if name.startswith("cuda:"):
        if launched_rank():
            raise EndedElsewhere(2)
        raise UserError(f"device {name!r}: each process takes a GPU of its own; give cuda")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        index, count = local_rank(), torch.cuda.device_count()
        if index > count:
            raise EndedElsewhere(2)
        if index == count:
            raise UserError(
                f"device {name!r}: process {index} of this machine has no GPU, there are {count}"
            )
        torch.cuda.set_device(index)
        return f"cuda:{index}"
    return name


def share(count: int, batch_size: int) -> range:
    """Starts of this process's batches of ``batch_size``, out of ``count`` things."""
    return range(rank() * batch_size, count, world_size() * batch_size)


def all_sum(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of ``array`` over all processes, in fp64."""
    _move_on()
    if world_size() == 1:
        return array
    total = torch.from_numpy(array.copy())
    dist.all_reduce(total)
    return total.numpy()


def all_max(*values: int) -> list[int]:
    """The largest of each of ``values`` over all processes.

    Args:
        values: below 2^63.
    """
    _move_on()
    if world_size() == 1:
        return list(values)
    largest = torch.tensor(values)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return [int(x) for x in largest]


def longest(seconds: float) -> float:
    """The longest of the durations that the processes have measured, to the microsecond.

    Args:
        seconds: this process's duration.
    """
    return all_max(int(seconds * 1e6))[0] / 1e6


def gather(items: list[Any]) -> list[Any]:
    """The lists ``items`` of all processes, one after the other."""
    if world_size() == 1:
        return items
    lists: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def check_same(what: str, mine: str) -> None:
    """Refuse to go on if a process has something else than the first one; all call it.

    Args:
        what: it is called so in the error.
        mine: stands for what this process has, as a digest does.

    Raises:
        UserError: on the first process that differs.
        EndedElsewhere: on the others, then.
    """
    every = gather([mine])
    other = next((number for number, theirs in enumerate(every) if theirs != every[0]), None)
    if other is None:
        return
    if other != rank():
        raise agreed(EndedElsewhere(2))
    raise agreed(
        UserError(
            f"{what}: process {other} (on {socket.gethostname()}) has {mine}, process 0 has "
            f"{every[0]}; all processes need the same"
        )
    )


def on_rank_0(work: Callable[[], Result]) -> Result:
    """Call ``work`` on rank 0 alone, and give all processes what it returns.

    All processes call this at the same place.

    Args:
        work: returns something that can be pickled.

    Raises:
        EndedElsewhere: on the other ranks, if ``work`` raises on rank 0; rank 0 raises that error.
    """
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None]

    def mine() -> None:
        if rank() == 0:
            outcome[0] = pickle.dumps(work())

    together(mine)
    dist.broadcast_object_list(outcome, device=_CPU)
    result: Result = pickle.loads(outcome[0])
    return result


def together(work: Callable[[], Result]) -> Result:
    """Call ``work`` on every process; if it raises on one, none continues.

    All processes call this at the same place.

    Args:
        work: a function that does not wait for other processes.

    Raises:
        EndedElsewhere: ``work`` has raised on another process and not here.
    """
    if world_size() == 1:
        return work()
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    system = isinstance(failure, OSError)
    code, by_system = all_max(0 if failure is None else exit_code(failure), int(system))
    if code:
        raise agreed(failure or EndedElsewhere(code), by_system=bool(by_system))
    return result


def agreed(error: Exception, *, by_system: bool = False) -> Exception:
    """The error, after marking it so that ``is_agreed`` holds.

    Args:
        error: an error that every process has, at the same place.
        by_system: an ``OSError`` of one of them is the cause.
    """
    error.agreed, error.by_system = True, by_system  # type: ignore[attr-defined]
    return error


def is_by_system(error: Exception) -> bool:
    """Whether the cause is an ``OSError``, of this process or of another one; all say the same.

    Args:
        error: one for which ``is_agreed`` holds.
    """
    return isinstance(error, OSError) or getattr(error, "by_system", False)


def is_agreed(error: Exception) -> bool:
    """Whether every process has reached the same place with an error, and can continue there.

    Args:
        error: the error that was caught.
    """
    return world_size() == 1 or getattr(error, "agreed", False)
