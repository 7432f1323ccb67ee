"""The ops at GPT-2's shapes: inputs, the work they must do, and who else can do it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt2 import kernels
from fastgpt2.kernels.jit import tuning

# an op as the tests know it, too: implementation's name and named inputs in, outputs out
Op = Callable[..., Any]
Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Sizes:
    """B sequences of T tokens through a model of width C, H heads and V (padded) tokens.

    S is the length of the key/value cache in decoding.
    """

    name: str
    B: int
    T: int
    C: int
    H: int
    V: int = 50304
    S: int = 1024

    @property
    def N(self) -> int:
        """Rows: tokens of all sequences."""
        return self.B * self.T


SIZES = (Sizes("124M", 16, 1024, 768, 12), Sizes("1558M", 8, 1024, 1600, 25))
# small enough for the interpreter, with more than one tile in every direction
DRY_SIZES = (Sizes("dry", 1, 20, 32, 2, 40, 272),)


@dataclass(frozen=True)
class Cost:
    """Bytes through device memory at the least, and floating-point operations."""

    bytes: float
    flops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class OpCase:
    """One op at one size.

    Attributes:
        op: name, as in ``fastgpt2.kernels``.
        shape: what the table shows.
        run: ``run(impl, **inputs)``.
        inputs: draws them, given a device and a dtype.
        forward: cost of the forward pass.
        backward: cost of the backward pass, None for an op without one.
        rivals: further providers by name: contexts in which PyTorch's own op runs.
        checked_against: whose error in the same dtype is the budget; not ``torch`` where it draws
            random numbers of its own.
    """

    op: str
    shape: str
    run: Op
    inputs: "Draw"
    forward: Cost
    backward: Cost | None = None
    rivals: Mapping[str, Context] = field(default_factory=dict)
    checked_against: str = "torch"

    @property
    def label(self) -> str:
        """Op and shape."""
        return f"{self.op} {self.shape}"

    def providers(self, compile: Callable[[Op], Op]) -> dict[str, Op]:
        """Everyone who can do it: triton, eager PyTorch, compiled PyTorch, and the rivals."""
        eager = partial(self.run, "torch")
        rivals = {name: _within(context, eager) for name, context in self.rivals.items()}
        ours = partial(self.run, "triton")
        return {"triton": ours, "eager": eager, "compile": compile(eager), **rivals}


def _within(context: Context, run: Op) -> Op:
    def inside(**inputs: Tensor) -> Any:
        with context():
            return run(**inputs)

    return inside


def _sdpa(backend: SDPBackend) -> Context:
    if not torch.cuda.is_available():
        # PyTorch has one CPU kernel; the dry run goes through the motions
        return nullcontext
    return lambda: sdpa_kernel(backend)


_SDPA_BACKENDS = {
    "flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
}


Draw = Callable[[torch.device, torch.dtype], dict[str, Tensor]]


def _draw(**shapes: tuple[int, ...]) -> Draw:
    """Normal numbers in these shapes; the weights of a ``matrix`` as small as a model's."""

    def draw(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        scales = {name: 0.02 if name == "matrix" else 1.0 for name in shapes}
        return {
            name: (torch.randn(shape, device=device) * scales[name]).to(dtype)
            for name, shape in shapes.items()
        }

    return draw


def _with_tokens(draw: Draw, name: str, shape: tuple[int, ...], limit: int) -> Draw:
    """What ``draw`` draws, and token ids below ``limit``."""
    return lambda device, dtype: {
        **draw(device, dtype),
        name: torch.randint(limit, shape, device=device),
    }


def _attention(s: Sizes, dropout_p: float) -> OpCase:
    def run(impl: str, qkv: Tensor) -> Tensor:
        # PyTorch's own dropout is faster than a given mask, and the fairer rival
        seed = None if impl == "torch" else 1
        return kernels.attention(qkv, n_head=s.H, dropout_p=dropout_p, seed=seed, impl=impl)

    elements, flops = s.N * s.C, 2.0 * s.N * s.T * s.C
    return OpCase(
        "attention",
        f"{s.name} B{s.B} T{s.T} H{s.H} D{s.C // s.H}{' dropout' if dropout_p else ''}",
        run,
        _draw(qkv=(s.B, s.T, 3 * s.C)),
        # q, k, v in, out out; then q, k, v, out, dout in, dq, dk, dv out; the mask halves the work
        Cost(4.0 * elements * 2, flops),
        Cost(8.0 * elements * 2, 2.5 * flops),
        _SDPA_BACKENDS,
        checked_against="reference" if dropout_p else "torch",
    )


def _layer_norm(s: Sizes) -> OpCase:
    def run(impl: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernels.layer_norm(x, weight, bias, impl=impl)

    row = 2.0 * s.N * s.C
    inputs = _draw(x=(s.N, s.C), weight=(s.C,), bias=(s.C,))
    return OpCase(
        "layer_norm", f"{s.name} N{s.N} C{s.C}", run, inputs, Cost(2 * row), Cost(3 * row)
    )


def _add_layer_norm(s: Sizes) -> OpCase:
    def run(impl: str, branch_bias: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.add_layer_norm(**inputs, branch_bias=branch_bias, impl=impl)  # type: ignore[arg-type]

    row = 2.0 * s.N * s.C
    rows, vector = (s.N, s.C), (s.C,)
    inputs = _draw(x=rows, branch=rows, weight=vector, bias=vector, branch_bias=vector)
    # x, branch in, sum, norm out; then sum, dsum, dnorm in, one gradient out for x and branch
    return OpCase(
        "add_layer_norm", f"{s.name} N{s.N} C{s.C}", run, inputs, Cost(4 * row), Cost(4 * row)
    )


def _bias_gelu(s: Sizes) -> OpCase:
    def run(impl: str, x: Tensor, bias: Tensor) -> Tensor:
        return kernels.bias_gelu(x, bias, impl=impl)

    width = 4 * s.C
    row = 2.0 * s.N * width
    inputs = _draw(x=(s.N, width), bias=(width,))
    return OpCase(
        "bias_gelu", f"{s.name} N{s.N} F{width}", run, inputs, Cost(2 * row), Cost(3 * row)
    )


def _linear_gelu(s: Sizes, fused: bool) -> OpCase:
    def run(impl: str, x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        if impl != "triton":
            return kernels.linear_gelu(x, matrix, bias, impl=impl)
        # by default the table of measurements decides, which these measurements fill
        with patch.object(tuning, "fused", lambda *_args, **_shape: fused):
            return kernels.linear_gelu(x, matrix, bias, impl=impl)

    width = 4 * s.C
    narrow, wide, matrix = 2.0 * s.N * s.C, 2.0 * s.N * width, 2.0 * s.C * width
    flops = 2.0 * s.N * s.C * width
    return OpCase(
        "linear_gelu",
        f"{s.name} N{s.N} C{s.C} F{width}{' fused' if fused else ''}",
        run,
        _draw(x=(s.N, s.C), matrix=(width, s.C), bias=(width,)),
        # the pre-activation is written for backward
        Cost(narrow + matrix + 2 * wide, flops),
        Cost(2 * wide + 2 * narrow + 2 * matrix, 2 * flops),
    )


def _cross_entropy(s: Sizes) -> OpCase:
    def run(impl: str, logits: Tensor, targets: Tensor) -> Tensor:
        return kernels.cross_entropy(logits, targets, impl=impl)

    row = 2.0 * s.N * s.V
    inputs = _with_tokens(_draw(logits=(s.N, s.V)), "targets", (s.N,), s.V)
    return OpCase("cross_entropy", f"{s.name} N{s.N} V{s.V}", run, inputs, Cost(row), Cost(row))


def _linear_cross_entropy(s: Sizes) -> OpCase:
    def run(impl: str, x: Tensor, matrix: Tensor, targets: Tensor) -> Tensor:
        return kernels.linear_cross_entropy(x, matrix, targets, impl=impl)

    inputs = _with_tokens(_draw(x=(s.N, s.C), matrix=(s.V, s.C)), "targets", (s.N,), s.V)
    operands, flops = 2.0 * (s.N + s.V) * s.C, 2.0 * s.N * s.V * s.C
    return OpCase(
        "linear_cross_entropy",
        f"{s.name} N{s.N} C{s.C} V{s.V}",
        run,
        inputs,
        Cost(operands, flops),
        Cost(2 * operands, 2 * flops),
    )


def _embedding(s: Sizes) -> OpCase:
    def run(impl: str, idx: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
        return kernels.embedding(idx, wte, wpe, impl=impl)

    row, table = 2.0 * s.N * s.C, 2.0 * (s.V + s.T) * s.C
    inputs = _with_tokens(_draw(wte=(s.V, s.C), wpe=(s.T, s.C)), "idx", (s.B, s.T), s.V)
    return OpCase(
        "embedding", f"{s.name} N{s.N} C{s.C}", run, inputs, Cost(2 * row), Cost(row + table)
    )


def _decode_attention(s: Sizes, batch: int) -> OpCase:
    def run(impl: str, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return kernels.decode_attention(q, k, v, lengths, impl=impl)

    D = s.C // s.H
    cache = (batch, s.H, s.S, D)

    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        drawn = _draw(q=(batch, s.H, D), k=cache, v=cache)(device, dtype)
        return {**drawn, "lengths": torch.full((batch,), s.S, device=device)}

    elements = 2.0 * batch * s.S * s.C
    cost = Cost(2 * elements, 2 * elements)
    return OpCase("decode_attention", f"{s.name} B{batch} S{s.S} H{s.H}", run, inputs, cost)


def op_cases(dry: bool = False, sizes: Sequence[Sizes] = SIZES) -> list[OpCase]:
    """Every op at every size; for a dry run at tiny ones instead."""
    cases = []
    for s in DRY_SIZES if dry else sizes:
        cases += [_attention(s, 0.0), _add_layer_norm(s), _layer_norm(s), _bias_gelu(s)]
        cases += [_linear_gelu(s, fused) for fused in (False, True)]
        cases += [_cross_entropy(s), _linear_cross_entropy(s), _embedding(s)]
        cases += [_decode_attention(s, batch) for batch in ((2,) if dry else (1, 64))]
        cases += [_attention(s, 0.1)]
    return cases
