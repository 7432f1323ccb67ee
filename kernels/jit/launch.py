"""The one place where a kernel is launched: on its tensors' GPU, with every option explicit.

Triton launches on the *current* device and stream, whatever device the tensors are on: without a
guard, a model on ``cuda:1`` would run on GPU 0 and read another GPU's memory.

Triton compiles each kernel at its first launch, one after another. ``noting`` notes launches
instead of running them, and ``compile_noted`` then compiles all of them at once.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

# explicit, since Triton's default changes: multiplications and additions become FMAs
COMPILER_OPTIONS = {"enable_fp_fusion": True}
# the compiler may assume that an address is a multiple of this many bytes
_ALIGNMENT = 16


@dataclass(frozen=True)
class _StandIn:
    """What the compiler reads of a tensor, without keeping its memory alive."""

    dtype: torch.dtype
    misalignment: int
    size: int

    def data_ptr(self) -> int:
        """An address, as far as its alignment goes."""
        return self.misalignment

    def ptr_range(self) -> int:
        """The bytes of the tensor's memory."""
        return self.size


@dataclass(frozen=True)
class Launch:
    """A launch that was noted: its tensors are stand-ins."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    meta: dict[str, Any]
    device: torch.device


# the list that launches are noted in instead of run; for all threads, since autograd has its own
_noted: list[Launch] | None = None


def _first_tensor(argument: Any) -> Tensor:
    return argument if isinstance(argument, Tensor) else _first_tensor(argument[0])


def _stand_in(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(_stand_in(part) for part in argument)
    if isinstance(argument, Tensor):
        size = argument.untyped_storage().size()
        return _StandIn(argument.dtype, argument.data_ptr() % _ALIGNMENT, size)
    return argument


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
    """Run ``kernel`` on ``grid``, on the device of its tensors.

    Args:
        kernel: the ``@triton.jit`` function.
        grid: how many programs, by dimension.
        arguments: the kernel's, in order; the first is a tensor or a tuple that begins with one,
            and the others are on the same device.
        meta: the kernel's constants, and the warps and stages of the launch.
    """
    device = _first_tensor(arguments[0]).device
    if _noted is not None:
        _noted.append(Launch(kernel, grid, _stand_in(arguments), meta, device))
        return
    with _on(device):
        kernel[grid](*arguments, **meta, **COMPILER_OPTIONS)


@contextmanager
def noting(launches: list[Launch] | None) -> Iterator[None]:
    """Within the block kernels do not run: each launch is appended to ``launches``.

    Memory that they would have written does not change. ``None`` runs them even in such a block.
    """
    global _noted
    previous, _noted = _noted, launches
    try:
        yield
    finally:
        _noted = previous


def compile_noted(launches: list[Launch], workers: int) -> int:
    """Compile what these launches need, in threads; a launch then finds it in Triton's cache.

    Most of a compilation runs outside Python's lock: LLVM, and ptxas as a program of its own.

    Args:
        launches: the list of ``noting``.
        workers: number of threads.

    Returns:
        How many different binaries the launches need, including those that existed already.
    """
    compiled = set()
    with ThreadPoolExecutor(workers) as pool, triton.AsyncCompileMode(pool):
        for launch in launches:
            with _on(launch.device):
                options = launch.meta | COMPILER_OPTIONS
                compiled.add(
                    id(launch.kernel.warmup(*launch.arguments, grid=launch.grid, **options))
                )
    return len(compiled)
