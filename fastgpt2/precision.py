"""The dtype that a model computes in, and autocast, which must not interfere."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastgpt2.kernels.modes import autocasts


def compute_dtype(weight: Tensor, device: torch.device) -> torch.dtype:
    """Autocast's dtype where it is on; an offloaded weight may be on another device."""
    if autocasts(device):
        return torch.get_autocast_dtype(device.type)
    return weight.dtype


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Every dtype is explicit in here: autocast's own casts would only add to them."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x.device) else nullcontext()
