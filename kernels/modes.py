"""What PyTorch does with a call besides running it: transforms, recordings, modes.

The fast forms of the ops decide in Python what to save and which library to call, and have only a
first derivative. They are not used while PyTorch does more than run a call.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backward = Callable[..., tuple[Tensor | None, ...]]


def transformed() -> bool:
    """Whether a transform of ``torch.func`` (grad, vmap, jvp ...) or forward-mode AD is active."""
    functions: bool = torch._C._are_functorch_transforms_active()
    return functions or forward_ad._current_level >= 0


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this device; the meta device has no autocast."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def recorded() -> bool:
    """Whether ``torch.export`` or ``torch.jit.trace`` is recording a program."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def is_ordinary(*tensors: Tensor | None) -> bool:
    """Whether this is a plain eager call: no tensor subclass, no mode that sees the operators."""
    return (
        all(x is None or type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not transformed()
        and not torch._C._get_tracing_state() is not None
    )


def first_order(op: str) -> Callable[[Backward], Backward]:
    """Make a backward pass that autograd cannot differentiate refuse ``create_graph=True``.

    A result without a graph would silently give a wrong second derivative.
    """

    def decorate(backward: Backward) -> Backward:
        @wraps(backward)
        def run(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():
                raise RuntimeError(f"{op}: double backward is not supported (create_graph=True)")
            return backward(ctx, *upstream)

        return run

    return decorate
