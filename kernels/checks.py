"""Argument checks of the public ops: each error names op, argument, expected and got."""

import math

import torch
from torch import Tensor


def check_tensor(op: str, name: str, x: Tensor) -> None:
    """``x`` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")


def check_floating(op: str, name: str, x: Tensor) -> None:
    """``x`` is a floating-point tensor."""
    check_tensor(op, name, x)
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {x.dtype}")


def check_rows(op: str, name: str, x: Tensor) -> None:
    """``x`` is floating point, (..., C), and C may be 0."""
    check_floating(op, name, x)
    if x.dim() == 0:
        raise ValueError(f"{op}: {name} must have at least one dimension, got shape ()")


def check_vectors(op: str, name: str, x: Tensor) -> None:
    """``x`` is floating point, (..., C) with C >= 1."""
    check_floating(op, name, x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"{op}: {name} must have a last dimension of 1 or more, got shape {tuple(x.shape)}"
        )


def check_integer(op: str, name: str, x: Tensor) -> None:
    """``x`` is an integer tensor (int32 or int64)."""
    check_tensor(op, name, x)
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: {name} must be int64 or int32, got {x.dtype}")


def check_dim(op: str, name: str, x: Tensor, dim: int, meaning: str) -> None:
    """``x`` is a tensor of ``dim`` dimensions."""
    check_tensor(op, name, x)
    if x.dim() != dim:
        raise ValueError(f"{op}: {name} must be {meaning}, got shape {tuple(x.shape)}")


def check_shape(op: str, name: str, x: Tensor, shape: tuple[int, ...], match: str) -> None:
    """``x`` is a tensor of exactly this shape, as ``match`` demands."""
    check_tensor(op, name, x)
    if x.shape != shape:
        raise ValueError(
            f"{op}: {name} must have shape {tuple(shape)} to match {match}, got {tuple(x.shape)}"
        )


def check_operand(op: str, name: str, x: Tensor, shape: tuple[int, ...], beside: Tensor) -> None:
    """``x`` is floating point, of this shape, on the device of ``beside``, the op's x."""
    # runs four times per layer and token: one look, and the reason only on failure
    fine = isinstance(x, Tensor) and x.is_floating_point()
    if not (fine and x.shape == shape and x.device == beside.device):
        check_floating(op, name, x)
        check_shape(op, name, x, shape, f"x {tuple(beside.shape)}")
        check_same_device(op, name, x, beside.device)


def check_layer(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """A linear layer's weight (F, C) and bias, (F,) or None, fit x (..., C)."""
    name = f"{prefix}weight"
    check_dim(op, name, weight, 2, "(F, C)")
    check_operand(op, name, weight, (weight.shape[0], x.shape[-1]), x)
    if bias is not None:
        check_operand(op, f"{prefix}bias", bias, weight.shape[:1], x)


def check_contiguous(op: str, name: str, x: Tensor) -> None:
    """``x`` has a contiguous last dimension."""
    if x.stride(-1) != 1:
        raise ValueError(
            f"{op}: {name} must have a contiguous last dimension, got stride {x.stride(-1)}"
        )


def check_same_device(op: str, name: str, x: Tensor, device: torch.device) -> None:
    """``x`` lies on ``device``."""
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {x.device}")


def check_dropout(op: str, p: float, seed: int | Tensor | None) -> None:
    """``p`` is a dropout rate, 0 <= p < 1, ``seed`` None, 64 bits or an integer scalar tensor."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {p}")
    if isinstance(seed, Tensor):
        check_integer(op, "seed", seed)
        check_dim(op, "seed", seed, 0, "a scalar")
    elif seed is not None:
        check_int(op, "seed", seed)
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"{op}: seed must fit into 64 bits, got {seed}")


def check_int(op: str, name: str, value: int) -> None:
    """``value`` is an ``int``."""
    if not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")


def check_positive(op: str, name: str, value: float) -> None:
    """``value`` is greater than zero, and not infinite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{op}: {name} must be positive and finite, got {value}")
