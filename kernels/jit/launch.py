"""The one place where a kernel is launched: on its tensors' GPU, with every option said.

Triton launches on the *current* device and stream, whatever device the tensors are on: without a
guard, a model on ``cuda:1`` would run on GPU 0 and read another GPU's memory.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

# said explicitly, since Triton's default changes: multiplications and additions become FMAs
COMPILER_OPTIONS = {"enable_fp_fusion": True}


def _first_tensor(argument: Any) -> Tensor:
    return argument if isinstance(argument, Tensor) else _first_tensor(argument[0])


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
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **meta, **COMPILER_OPTIONS)
