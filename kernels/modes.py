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


def exported() -> bool:
    """Whether ``torch.export`` is recording a program.

    To the compiler of PyTorch 2.11, ``torch.compiler.is_exporting()`` is true in any program.
    """
    flag: bool = torch.compiler._is_exporting_flag
    return flag


def recorded() -> bool:
    """Whether ``torch.export`` or ``torch.jit.trace`` is recording a program."""
    return exported() or torch._C._get_tracing_state() is not None


def is_ordinary(*tensors: Tensor | None) -> bool:
    """Whether this is a plain eager call: no tensor subclass, no mode that sees the operators."""
    return (
        all(x is None or type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not transformed()
        and not torch._C._get_tracing_state() is not None
    )


class _Refusal(torch.autograd.Function):
    """Gradients as they are, and an error for whoever differentiates them by an anchor."""

    @staticmethod
    def forward(ctx: Any, said: str, anchors: int, *tensors: Tensor | None) -> Any:
        ctx.said = said
        return tuple(None if g is None else g.detach() for g in tensors[anchors:])

    @staticmethod
    def backward(ctx: Any, *_unused: Tensor) -> Any:
        raise RuntimeError(ctx.said)


def first_order(op: str) -> Callable[[Backward], Backward]:
    """Decorates a backward pass that autograd cannot see through.

    With ``create_graph=True`` the gradients are right, and whoever differentiates them by what they
    depend on, the upstream gradients and what was saved of the graph, meets an error: a gradient
    without a graph would be a wrong second derivative, and nobody would say so.
    """
    said = f"{op}: double backward is not supported (create_graph=True)"

    def decorate(backward: Backward) -> Backward:
        @wraps(backward)
        def run(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
            wants_graph = torch.is_grad_enabled()
            with torch.no_grad():
                grads = backward(ctx, *upstream)
            if not wants_graph:
                return grads
            known = (*ctx.saved_tensors, *upstream)
            anchors = [x for x in known if x is not None and x.requires_grad]
            refused: tuple[Tensor | None, ...]
            refused = _Refusal.apply(said, len(anchors), *anchors, *grads)  # type: ignore[no-untyped-call]
            return refused

        return run

    return decorate
