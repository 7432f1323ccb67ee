"""Which implementation of an op runs, and why.

``auto`` takes Triton on a CUDA (or ROCm) device that can run it, PyTorch's own operators
everywhere else. A named implementation that cannot run raises: nothing falls back silently.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec

import torch
from torch import Tensor

from fastgpt2.kernels.gpus import ARCHITECTURES
from fastgpt2.kernels.modes import transformed


class Impl(StrEnum):
    """An implementation of an op; a plain string is accepted in its place."""

    AUTO = "auto"
    TRITON = "triton"
    TORCH = "torch"
    REFERENCE = "reference"


_IMPLS = {impl.value: impl for impl in Impl}

# read once: Triton, too, decides at import whether its kernels are interpreted
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_TRITON_INSTALLED = find_spec("triton") is not None
# Ampere is the first with bf16 tensor cores and 64 KB of shared memory per block
_OLDEST_CAPABILITY = (8, 0)
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# current meaning of `auto`, set by use_impl
_default = Impl.AUTO


def parse_impl(impl: str, op: str = "use_impl") -> Impl:
    """The ``Impl`` of that name; a ValueError that names ``op`` lists them if there is none."""
    # not Impl(impl): PyTorch 2.11 cannot trace that call within an autograd.Function
    if not isinstance(impl, str) or impl not in _IMPLS:
        raise ValueError(f"{op}: impl must be one of {', '.join(Impl)}, got {impl!r}")
    return _IMPLS[impl]


@contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Within the block, ``impl="auto"`` means ``impl`` (process-wide, as a global default).

    >>> with use_impl("reference"):
    ...     loss = model(idx, targets)[1]
    """
    global _default
    previous, _default = _default, parse_impl(impl)
    try:
        yield
    finally:
        _default = previous


def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a CUDA device, None the current one; a constant to the compiler."""
    return torch.cuda.get_device_capability(index)


# the effect of torch.compiler.assume_constant_result, without importing Dynamo and thus Triton
capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def amd_architecture(index: int | None) -> str:
    """``gfx942`` and the like of an AMD GPU, None the current one; a constant to the compiler."""
    found: str = torch.cuda.get_device_properties(index).gcnArchName
    # the rest of the name lists the features that are switched on
    return found.partition(":")[0]


amd_architecture._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _gpu_obstacle(index: int | None) -> str | None:
    """Why no kernel runs on this GPU, or None."""
    if torch.version.hip is None:
        if capability(index) < _OLDEST_CAPABILITY:
            return "the GPU is older than compute capability 8.0"
        return None
    name = amd_architecture(index)
    if name in ARCHITECTURES:
        return None
    known = ", ".join(arch for arch in ARCHITECTURES if arch.startswith("gfx"))
    return f"among AMD's GPUs the kernels have tiles for {known}, not for {name}"


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will need the gradient of any of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _triton_obstacle(x: Tensor) -> str | None:
    """Why Triton cannot run on this tensor, or None if it can."""
    if transformed():
        return "transforms of torch.func and forward-mode AD go through impl='reference'"
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if x.dtype not in _TRITON_DTYPES:
        return f"the kernels take fp32, fp16 and bf16, not {x.dtype}"
    if INTERPRETED:
        return None
    if not x.is_cuda:
        return f"the tensor is on {x.device.type} (set TRITON_INTERPRET=1 to interpret the kernels)"
    return _gpu_obstacle(x.device.index)


def resolve(
    op: str, impl: str, x: Tensor, own_obstacle: Callable[[], str | None] | None = None
) -> Impl:
    """The implementation of ``op`` that runs on ``x``.

    Within a transform of ``torch.func`` or forward-mode AD it is the formula itself, ``reference``,
    since autograd knows every derivative of its operators.

    Args:
        op: its name, for messages.
        impl: what was asked for.
        x: the tensor that decides.
        own_obstacle: says why this op's kernels cannot run, or None; called only where Triton can.

    Raises:
        ValueError: ``impl`` is not the name of an implementation.
        RuntimeError: ``triton`` was asked for by name and cannot run here; says why.
    """
    choice = parse_impl(impl, op)
    if choice is Impl.AUTO:
        choice = _default
    if choice is Impl.AUTO:
        if transformed():
            return Impl.REFERENCE
        on_gpu = x.is_cuda and _triton_obstacle(x) is None
        able = on_gpu and (own_obstacle is None or own_obstacle() is None)
        return Impl.TRITON if able else Impl.TORCH
    if choice is Impl.TRITON:
        obstacle = _triton_obstacle(x)
        if obstacle is None and own_obstacle is not None:
            obstacle = own_obstacle()
        if obstacle is not None:
            raise RuntimeError(f"{op}: impl='triton' cannot run: {obstacle}")
    if choice is Impl.TORCH and transformed():
        return Impl.REFERENCE
    return choice


def explain(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, impl: str = "auto"
) -> str:
    """One line: which implementation ``impl`` runs on this device and dtype, and why.

    Raises:
        RuntimeError: ``triton`` was asked for by name and cannot run there.
    """
    probe = torch.empty(0, device=device, dtype=dtype)
    choice = resolve("kernels", impl, probe)
    if parse_impl(impl) is not Impl.AUTO:
        return f"{choice}, as asked for"
    if _default is not Impl.AUTO:
        return f"{choice}, chosen by use_impl"
    if choice is Impl.TRITON:
        return f"triton on {torch.cuda.get_device_name(probe.device)}"
    if not probe.is_cuda:
        return f"torch (Triton kernels run on a GPU, the tensors are on {probe.device.type})"
    return f"torch ({_triton_obstacle(probe)})"
