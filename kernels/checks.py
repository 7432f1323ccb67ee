"""Argument checks of the public ops: each error names op, argument, expected and got."""

import torch
from torch import Tensor


def check_floating(op: str, name: str, x: Tensor) -> None:
    """``x`` is a floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {x.dtype}")


def check_vectors(op: str, name: str, x: Tensor) -> None:
    """``x`` is floating point, (..., C) with C >= 1."""
    check_floating(op, name, x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"{op}: {name} must have a last dimension of 1 or more, got shape {tuple(x.shape)}"
        )


def check_integer(op: str, name: str, x: Tensor) -> None:
    """``x`` is an integer tensor (int32 or int64)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: {name} must be int64 or int32, got {x.dtype}")


def check_dim(op: str, name: str, x: Tensor, dim: int, meaning: str) -> None:
    """``x`` has ``dim`` dimensions."""
    if x.dim() != dim:
        raise ValueError(f"{op}: {name} must be {meaning}, got shape {tuple(x.shape)}")


def check_shape(op: str, name: str, x: Tensor, shape: tuple[int, ...], match: str) -> None:
    """``x`` has exactly this shape, as ``match`` demands."""
    if x.shape != shape:
        raise ValueError(
            f"{op}: {name} must have shape {tuple(shape)} to match {match}, got {tuple(x.shape)}"
        )


def check_operand(op: str, name: str, x: Tensor, shape: tuple[int, ...], beside: Tensor) -> None:
    """``x`` is floating point, of this shape, on the device of x, ``beside``."""
    check_floating(op, name, x)
    check_shape(op, name, x, shape, f"x {tuple(beside.shape)}")
    check_same_device(op, name, x, beside.device)


def check_same_device(op: str, name: str, x: Tensor, device: torch.device) -> None:
    """``x`` lies on ``device``."""
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {x.device}")


def check_dropout(op: str, p: float) -> None:
    """``p`` is a dropout rate, 0 <= p < 1."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {p}")


def check_positive(op: str, name: str, value: float) -> None:
    """``value`` is greater than zero."""
    if not value > 0:
        raise ValueError(f"{op}: {name} must be positive, got {value}")
