"""The ops at GPT-2's shapes: inputs, cost, and PyTorch's own implementation."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Scale
from fastgpt2 import kernels
from fastgpt2.kernels.decode_linear import MAX_ROWS

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


SIZES = {
    Scale.CUDA: (Sizes("124M", 16, 1024, 768, 12), Sizes("1558M", 8, 1024, 1600, 25)),
    Scale.CPU: (Sizes("124M", 2, 512, 768, 12, S=512, head_T=256),),
    # small enough for the interpreter, but more than one tile in every dimension
    Scale.DRY: (Sizes("dry", 1, 20, 32, 2, 40, 272),),
}
DECODE_BATCHES = {Scale.CUDA: (1, 64), Scale.CPU: (1, 8), Scale.DRY: (2,)}


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


_SDPA_BACKENDS = {
    name: partial(sdpa_kernel, backend)
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
    )
}


Draw = Callable[[torch.device, torch.dtype], dict[str, Tensor]]


def _draw(**shapes: tuple[int, ...]) -> Draw:
    """Normal numbers in these shapes; a ``matrix`` is as small as a model's weights."""

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


def _with_lengths(draw: Draw, batch: int, S: int) -> Draw:
    """What ``draw`` draws, and lengths that leave one of S slots free."""
    return lambda device, dtype: {
        **draw(device, dtype),
        "lengths": torch.full((batch,), S - 1, device=device),
    }


def _attention(s: Sizes, dropout_p: float) -> OpCase:
    def run(impl: str, qkv: Tensor) -> Tensor:
        return kernels.attention(qkv, n_head=s.H, dropout_p=dropout_p, seed=1, impl=impl)

    def plain(qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(s.B, s.T, 3, s.H, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        return y.transpose(1, 2).reshape(s.B, s.T, s.C)

    elements, flops = s.N * s.C, 2.0 * s.N * s.T * s.C
    return OpCase(
        "attention",
        f"{s.name} B{s.B} T{s.T} H{s.H} D{s.C // s.H}{' dropout' if dropout_p else ''}",
        run,
        plain,
        _draw(qkv=(s.B, s.T, 3 * s.C)),
        # forward reads q, k, v, writes out; backward reads these and dout, writes dq, dk, dv; the
        # mask halves the work
        Cost(4.0 * elements * 2, flops),
        Cost(8.0 * elements * 2, 2.5 * flops),
        _SDPA_BACKENDS,
        random=dropout_p > 0,
    )


def _layer_norm(s: Sizes) -> OpCase:
    def run(impl: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernels.layer_norm(x, weight, bias, impl=impl)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (s.C,), weight, bias)

    row = 2.0 * s.N * s.C
    inputs = _draw(x=(s.N, s.C), weight=(s.C,), bias=(s.C,))
    return OpCase(
        "layer_norm", f"{s.name} N{s.N} C{s.C}", run, plain, inputs, Cost(2 * row), Cost(3 * row)
    )


def _add_layer_norm(s: Sizes) -> OpCase:
    def run(impl: str, branch_bias: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.add_layer_norm(**inputs, branch_bias=branch_bias, impl=impl)  # type: ignore[arg-type]

    def plain(
        x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, branch_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = x + (branch + branch_bias)
        return total, F.layer_norm(total, (s.C,), weight, bias)

    row = 2.0 * s.N * s.C
    rows, vector = (s.N, s.C), (s.C,)
    inputs = _draw(x=rows, branch=rows, weight=vector, bias=vector, branch_bias=vector)
    # forward reads x, branch, writes sum, norm; backward reads sum, dsum, dnorm and writes one
    # gradient for x and branch
    return OpCase(
        "add_layer_norm",
        f"{s.name} N{s.N} C{s.C}",
        run,
        plain,
        inputs,
        Cost(4 * row),
        Cost(4 * row),
    )


def _add_branch(s: Sizes) -> OpCase:
    def run(impl: str, x: Tensor, branch: Tensor, branch_bias: Tensor) -> Tensor:
        return kernels.add_branch(x, branch, branch_bias, impl=impl)

    def plain(x: Tensor, branch: Tensor, branch_bias: Tensor) -> Tensor:
        return x + (branch + branch_bias)

    row = 2.0 * s.N * s.C
    inputs = _draw(x=(s.N, s.C), branch=(s.N, s.C), branch_bias=(s.C,))
    # forward reads x and branch, writes sum; the sum's gradient is that of both, so backward only
    # reads it, for the bias
    return OpCase(
        "add_branch", f"{s.name} N{s.N} C{s.C}", run, plain, inputs, Cost(3 * row), Cost(row)
    )


def _bias_gelu(s: Sizes) -> OpCase:
    def run(impl: str, x: Tensor, bias: Tensor) -> Tensor:
        return kernels.bias_gelu(x, bias, impl=impl)

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias, approximate="tanh")

    width = 4 * s.C
    row = 2.0 * s.N * width
    inputs = _draw(x=(s.N, width), bias=(width,))
    return OpCase(
        "bias_gelu", f"{s.name} N{s.N} F{width}", run, plain, inputs, Cost(2 * row), Cost(3 * row)
    )


def _linear_gelu(s: Sizes, fused: bool) -> OpCase:
    def run(impl: str, x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        return kernels.linear_gelu(x, matrix, bias, fused=fused, impl=impl)

    def plain(x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, matrix, bias), approximate="tanh")

    width = 4 * s.C
    narrow, wide, matrix = 2.0 * s.N * s.C, 2.0 * s.N * width, 2.0 * s.C * width
    flops = 2.0 * s.N * s.C * width
    return OpCase(
        "linear_gelu",
        f"{s.name} N{s.N} C{s.C} F{width}{' fused' if fused else ''}",
        run,
        plain,
        _draw(x=(s.N, s.C), matrix=(width, s.C), bias=(width,)),
        # the pre-activation is written for backward
        Cost(narrow + matrix + 2 * wide, flops),
        Cost(2 * wide + 2 * narrow + 2 * matrix, 2 * flops),
    )


def _cross_entropy(s: Sizes) -> OpCase:
    def run(impl: str, logits: Tensor, targets: Tensor) -> Tensor:
        return kernels.cross_entropy(logits, targets, impl=impl)

    def plain(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets)

    row = 2.0 * s.N * s.V
    inputs = _with_tokens(_draw(logits=(s.N, s.V)), "targets", (s.N,), s.V)
    return OpCase(
        "cross_entropy", f"{s.name} N{s.N} V{s.V}", run, plain, inputs, Cost(row), Cost(row)
    )


def _linear_cross_entropy(s: Sizes) -> OpCase:
    if s.head_T is not None:
        s = replace(s, B=1, T=s.head_T)

    def run(impl: str, x: Tensor, matrix: Tensor, targets: Tensor) -> Tensor:
        return kernels.linear_cross_entropy(x, matrix, targets, impl=impl)

    def plain(x: Tensor, matrix: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, matrix).float(), targets)

    inputs = _with_tokens(_draw(x=(s.N, s.C), matrix=(s.V, s.C)), "targets", (s.N,), s.V)
    operands, flops = 2.0 * (s.N + s.V) * s.C, 2.0 * s.N * s.V * s.C
    return OpCase(
        "linear_cross_entropy",
        f"{s.name} N{s.N} C{s.C} V{s.V}",
        run,
        plain,
        inputs,
        Cost(operands, flops),
        Cost(2 * operands, 2 * flops),
    )


def _embedding(s: Sizes) -> OpCase:
    def run(impl: str, idx: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
        return kernels.embedding(idx, wte, wpe, impl=impl)

    def plain(idx: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
        return F.embedding(idx, wte) + wpe

    row, table = 2.0 * s.N * s.C, 2.0 * (s.V + s.T) * s.C
    inputs = _with_tokens(_draw(wte=(s.V, s.C), wpe=(s.T, s.C)), "idx", (s.B, s.T), s.V)
    return OpCase(
        "embedding", f"{s.name} N{s.N} C{s.C}", run, plain, inputs, Cost(2 * row), Cost(row + table)
    )


def _decode_attention(s: Sizes, batch: int) -> OpCase:
    def run(impl: str, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return kernels.decode_attention(q, k, v, lengths, impl=impl)

    def plain(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        # the caches are full
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)

    D = s.C // s.H
    cache = (batch, s.H, s.S, D)

    inputs = _with_lengths(_draw(q=(batch, 1, s.H, D), k=cache, v=cache), batch, s.S)
    elements = 2.0 * batch * s.S * s.C
    cost = Cost(2 * elements, 2 * elements)
    return OpCase("decode_attention", f"{s.name} B{batch} S{s.S} H{s.H}", run, plain, inputs, cost)


def _append_kv(s: Sizes, batch: int) -> OpCase:
    def run(impl: str, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, **kv: Tensor) -> Any:
        kernels.append_kv(k_cache, v_cache, **kv, lengths=lengths, impl=impl)
        return k_cache, v_cache

    def plain(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Any:
        rows = torch.arange(batch, device=k.device)[:, None]
        k_cache[rows, :, lengths[:, None]] = k
        v_cache[rows, :, lengths[:, None]] = v
        return k_cache, v_cache

    D = s.C // s.H
    cache, new = (batch, s.H, s.S, D), (batch, 1, s.H, D)
    inputs = _with_lengths(_draw(k_cache=cache, v_cache=cache, k=new, v=new), batch, s.S)
    # reads two rows and writes two
    cost = Cost(4 * 2.0 * batch * s.C)
    return OpCase("append_kv", f"{s.name} B{batch} S{s.S} H{s.H}", run, plain, inputs, cost)


def _decode_linear(s: Sizes, batch: int) -> OpCase:
    """LayerNorm and the projection to queries, keys and values."""

    def run(impl: str, x: Tensor, matrix: Tensor, bias: Tensor, **norm: Any) -> Tensor:
        return kernels.decode_linear(x, matrix, bias, **norm, impl=impl)

    def plain(
        x: Tensor, matrix: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor
    ) -> Tensor:
        return F.linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias), matrix, bias)

    norm = {"norm_weight": (s.C,), "norm_bias": (s.C,)}
    inputs = _draw(x=(batch, s.C), matrix=(3 * s.C, s.C), bias=(3 * s.C,), **norm)
    elements = 3.0 * s.C * s.C
    cost = Cost(2 * elements, 2 * batch * elements)
    return OpCase("decode_linear", f"{s.name} B{batch} C{s.C}", run, plain, inputs, cost)


def cases_at(s: Sizes, decode_batches: Sequence[int], *, on_kernels: bool) -> list[OpCase]:
    """Every op at one size; ``on_kernels`` adds the forms that only the kernels have."""
    cases = [_attention(s, 0.0), _add_layer_norm(s), _add_branch(s), _layer_norm(s)]
    cases += [_bias_gelu(s), _linear_gelu(s, fused=False)]
    cases += [_cross_entropy(s), _linear_cross_entropy(s), _embedding(s)]
    for batch in decode_batches:
        cases += [_append_kv(s, batch), _decode_attention(s, batch)]
        if batch <= MAX_ROWS:
            cases.append(_decode_linear(s, batch))
    if on_kernels:
        cases += [_linear_gelu(s, fused=True), _attention(s, 0.1)]
    return cases


def op_cases(scale: Scale, *ops: str) -> list[OpCase]:
    """The named ops, or all, at every size of a scale."""
    return [
        case
        for s in SIZES[scale]
        for case in cases_at(s, DECODE_BATCHES[scale], on_kernels=scale is not Scale.CPU)
        if not ops or case.op in ops
    ]
