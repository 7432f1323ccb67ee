"""Which modules are just what they were built as, so that a kernel may take their weights.

A forward hook, LoRA, weight norm, quantisation, offloading and many other tools work by changing
what the call of a module does. Whoever reads ``layer.weight`` and never calls ``layer`` would pass
all of them by. So the model asks here first, and calls the module itself where anything is unusual.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

Kind = TypeVar("Kind", bound=nn.Module)

_HALVES = (torch.float16, torch.bfloat16)
# what the call of an instance runs, unless a tool has put its own function there
_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.Linear, nn.Embedding, nn.LayerNorm)
}


def replaceable(kind: type[Kind]) -> type[Kind]:
    """A class decorator: a kernel stands in for this class's ``forward``, and for no other.

    Args:
        kind: the class, as it is defined.
    """
    _FORWARDS[kind] = kind.forward
    return kind


def obstacle(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why ``module`` must be called, or None if it is a plain ``kind``."""
    if type(module) is not kind:
        return f"it is a {type(module).__name__}"
    own = vars(module)
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "_hf_hook" in own
    ):
        return "it has hooks"
    if "forward" in own or own.get("_compiled_call_impl") is not None:
        return "its forward has been replaced"
    if kind.forward is not _FORWARDS[kind]:
        return f"the forward of {kind.__name__} has been replaced"
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return "every module has hooks"
    weight = own["_parameters"].get("weight")
    if weight is not None and not _is_ordinary(weight):
        return f"its weight is a {type(weight).__name__}"
    if (kind is nn.Embedding and _has_options(own)) or (kind is nn.LayerNorm and _is_unusual(own)):
        return "it has options of its own"
    return None


def _is_ordinary(weight: Tensor) -> bool:
    """Not of a subclass, which has operators of its own: quantised, or spread over devices."""
    return type(weight) in (Tensor, nn.Parameter) or isinstance(weight, FakeTensor)


def _has_options(embedding: dict[str, Any]) -> bool:
    switches = ("scale_grad_by_freq", "sparse")
    values = ("padding_idx", "max_norm")
    return any(embedding[name] for name in switches) or any(
        embedding[name] is not None for name in values
    )


def _is_unusual(norm: dict[str, Any]) -> bool:
    affine = norm["_parameters"]["weight"] is not None
    return not affine or len(norm["normalized_shape"]) != 1 or norm["eps"] <= 0


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a kernel may do what the call of ``module`` would do."""
    return obstacle(module, kind) is None


def call(module: nn.Module, x: Tensor, *others: Any, **named: Any) -> Tensor:
    """The module's own call; its parameters may have another dtype than x, which the result has."""
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    if dtypes <= {x.dtype}:
        out: Tensor = module(x, *others, **named)
    elif x.dtype in _HALVES:
        with torch.autocast(x.device.type, dtype=x.dtype):
            out = module(x, *others, **named)
    else:
        out = module(x.to(dtypes.pop()), *others, **named)
    return out.to(x.dtype)


def execution_device(module: nn.Embedding) -> torch.device:
    """Where the module computes: where its weight is, unless accelerate's hook fetches that."""
    fetched = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return module.weight.device if fetched is None else torch.device(fetched)
