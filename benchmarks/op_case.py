"""The benchmark of an op: sizes, inputs, cost, our function and PyTorch's."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# an op as in the tests: implementation's name and named inputs -> outputs
Op = Callable[..., Any]
Context = Callable[[], AbstractContextManager[Any]]

FORWARD, BACKWARD, BOTH = "forward", "backward", "both"


@dataclass(frozen=True)
class Sizes:
    """B sequences of T tokens through a model of width C, H heads and V (padded) tokens.

    S is the length of the key/value cache in decoding. The head with its loss, by far the largest
    op, uses ``head_T`` tokens of one sequence if that is given.
    """

    name: str
    B: int
    T: int
    C: int
    H: int
    V: int = 50304
    S: int = 1024
    head_T: int | None = None

    @property
    def N(self) -> int:
        """Rows: tokens of all sequences."""
        return self.B * self.T


@dataclass(frozen=True)
class Cost:
    """Fewest bytes through device memory, and floating-point operations."""

    bytes: float
    flops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class OpCase:
    """One op at one size.

    Attributes:
        op: name, as in ``fastgpt2.kernels``.
        shape: shown in the table.
        run: ``run(impl, **inputs)``: ours.
        plain: ``plain(**inputs)``: the same with PyTorch's own functions.
        inputs: draws the inputs, given a device and a dtype.
        forward: cost of the forward pass.
        backward: cost of the backward pass, None for an op without one.
        backends: further providers by name: contexts in which ``plain`` runs.
        random: whether ``plain`` draws its own random numbers, so that its output differs.
    """

    op: str
    shape: str
    run: Op
    plain: Op
    inputs: "Draw"
    forward: Cost
    backward: Cost | None = None
    backends: Mapping[str, Context] = field(default_factory=dict)
    random: bool = False

    @property
    def label(self) -> str:
        """Op and shape."""
        return f"{self.op} {self.shape}"

    @property
    def modes(self) -> tuple[str, ...]:
        """The passes that are timed."""
        return (FORWARD,) if self.backward is None else (FORWARD, BACKWARD, BOTH)

    def cost(self, mode: str) -> Cost:
        """The cost of one pass, or of both."""
        costs = {FORWARD: self.forward}
        if self.backward is not None:
            costs |= {BACKWARD: self.backward, BOTH: self.forward + self.backward}
        return costs[mode]


Draw = Callable[[torch.device, torch.dtype], dict[str, Tensor]]


def draw(**shapes: tuple[int, ...]) -> Draw:
    """Normal numbers in these shapes; a ``matrix`` is as small as a model's weights."""

    def drawn(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        scales = {name: 0.02 if name == "matrix" else 1.0 for name in shapes}
        return {
            name: (torch.randn(shape, device=device) * scales[name]).to(dtype)
            for name, shape in shapes.items()
        }

    return drawn


def with_tokens(draw: Draw, name: str, shape: tuple[int, ...], limit: int) -> Draw:
    """What ``draw`` draws, and token ids below ``limit``."""
    return lambda device, dtype: {
        **draw(device, dtype),
        name: torch.randint(limit, shape, device=device),
    }


def with_lengths(draw: Draw, batch: int, S: int) -> Draw:
    """What ``draw`` draws, and lengths that leave one of S slots free."""
    return lambda device, dtype: {
        **draw(device, dtype),
        "lengths": torch.full((batch,), S - 1, device=device),
    }
