"""The ops at GPT-2's shapes: inputs, cost, and PyTorch's own implementation."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Scale
from benchmarks.op_case import Cost, OpCase, Sizes, draw, with_lengths, with_tokens
from fastgpt2 import kernels
from fastgpt2.kernels.decode_linear import MAX_ROWS
from fastgpt2.kernels.quantize_fp8 import E4M3, MULTIPLE, no_fp8_kernel, quantize_fp8

SIZES = {
    Scale.CUDA: (Sizes("124M", 16, 1024, 768, 12), Sizes("1558M", 8, 1024, 1600, 25)),
    Scale.CPU: (Sizes("124M", 2, 512, 768, 12, S=512, head_T=256),),
    # small enough for the interpreter, but more than one tile in every dimension
    Scale.DRY: (Sizes("dry", 1, 20, 32, 2, 40, 272),),
}
DECODE_BATCHES = {Scale.CUDA: (1, 64), Scale.CPU: (1, 8), Scale.DRY: (2,)}


_SDPA_BACKENDS = {
    name: partial(sdpa_kernel, backend)
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
    )
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
        draw(qkv=(s.B, s.T, 3 * s.C)),
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
    inputs = draw(x=(s.N, s.C), weight=(s.C,), bias=(s.C,))
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
    inputs = draw(x=rows, branch=rows, weight=vector, bias=vector, branch_bias=vector)
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
    inputs = draw(x=(s.N, s.C), branch=(s.N, s.C), branch_bias=(s.C,))
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
    inputs = draw(x=(s.N, width), bias=(width,))
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
        draw(x=(s.N, s.C), matrix=(width, s.C), bias=(width,)),
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
    inputs = with_tokens(draw(logits=(s.N, s.V)), "targets", (s.N,), s.V)
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

    inputs = with_tokens(draw(x=(s.N, s.C), matrix=(s.V, s.C)), "targets", (s.N,), s.V)
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


def _quantize_fp8(s: Sizes) -> OpCase:
    """What the MLP's second layer reads, in both layouts."""

    def run(impl: str, x: Tensor) -> tuple[Tensor, Tensor]:
        straight, turned = quantize_fp8(x, E4M3, impl=impl)
        return straight.values, turned.values

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.finfo(E4M3).max / x.abs().amax().float()
        q = (x * scale[None]).to(E4M3)
        turned = F.pad(q.view(torch.uint8).t(), (0, -s.N % MULTIPLE)).contiguous()
        return q, turned.view(E4M3)

    width = 4 * s.C
    elements = float(s.N * width)
    inputs = draw(x=(s.N, width))
    # x is read for its largest magnitude and once more, and written twice
    cost = Cost(6 * elements)
    return OpCase("quantize_fp8", f"{s.name} N{s.N} F{width}", run, plain, inputs, cost)


def _embedding(s: Sizes) -> OpCase:
    def run(impl: str, idx: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
        return kernels.embedding(idx, wte, wpe, impl=impl)

    def plain(idx: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
        return F.embedding(idx, wte) + wpe

    row, table = 2.0 * s.N * s.C, 2.0 * (s.V + s.T) * s.C
    inputs = with_tokens(draw(wte=(s.V, s.C), wpe=(s.T, s.C)), "idx", (s.B, s.T), s.V)
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

    inputs = with_lengths(draw(q=(batch, 1, s.H, D), k=cache, v=cache), batch, s.S)
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
    inputs = with_lengths(draw(k_cache=cache, v_cache=cache, k=new, v=new), batch, s.S)
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
    inputs = draw(x=(batch, s.C), matrix=(3 * s.C, s.C), bias=(3 * s.C,), **norm)
    elements = 3.0 * s.C * s.C
    cost = Cost(2 * elements, 2 * batch * elements)
    return OpCase("decode_linear", f"{s.name} B{batch} C{s.C}", run, plain, inputs, cost)


def _decode_qkv(s: Sizes, batch: int) -> OpCase:
    """The same, with the write of keys and values to the cache."""
    D = s.C // s.H

    def run(impl: str, x: Tensor, matrix: Tensor, bias: Tensor, **cache: Any) -> Any:
        k_cache, v_cache = cache["k_cache"], cache["v_cache"]
        return kernels.decode_qkv(x, matrix, bias, **cache, impl=impl), k_cache, v_cache

    def plain(
        x: Tensor,
        matrix: Tensor,
        bias: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        lengths: Tensor,
        **norm: Tensor,
    ) -> Any:
        normed = F.layer_norm(x, (s.C,), norm["norm_weight"], norm["norm_bias"])
        q, k, v = F.linear(normed, matrix, bias).view(batch, 3, s.H, D).unbind(1)
        rows = torch.arange(batch, device=x.device)
        k_cache[rows, :, lengths], v_cache[rows, :, lengths] = k, v
        return q, k_cache, v_cache

    cache = (batch, s.H, s.S, D)
    shapes = {"norm_weight": (s.C,), "norm_bias": (s.C,), "k_cache": cache, "v_cache": cache}
    shapes |= {"x": (batch, s.C), "matrix": (3 * s.C, s.C), "bias": (3 * s.C,)}
    inputs = with_lengths(draw(**shapes), batch, s.S)
    elements = 3.0 * s.C * s.C
    cost = Cost(2 * elements, 2 * batch * elements)
    return OpCase("decode_qkv", f"{s.name} B{batch} S{s.S} C{s.C}", run, plain, inputs, cost)


def _decode_head(s: Sizes, batch: int) -> OpCase:
    """The last LayerNorm and the head."""

    def run(impl: str, x: Tensor, matrix: Tensor, **norm: Any) -> Tensor:
        return kernels.decode_head(x, matrix, **norm, impl=impl)[0]

    def plain(x: Tensor, matrix: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        return F.linear(F.layer_norm(x, (s.C,), norm_weight, norm_bias), matrix)

    norm = {"norm_weight": (s.C,), "norm_bias": (s.C,)}
    inputs = draw(x=(batch, s.C), matrix=(s.V, s.C), **norm)
    elements = float(s.V * s.C)
    cost = Cost(2 * elements, 2 * batch * elements)
    return OpCase("decode_head", f"{s.name} B{batch} C{s.C}", run, plain, inputs, cost)


def _decode_greedy(s: Sizes, batch: int) -> OpCase:
    """The largest logit of each row, and its id to where the next step reads it."""

    def run(impl: str, logits: Tensor, recent: Tensor, **counters: Tensor) -> Tensor:
        kernels.decode_greedy(logits, None, **counters, recent=recent, impl=impl)
        return counters["tokens"].double()

    def plain(logits: Tensor, tokens: Tensor, **_: Tensor) -> Tensor:
        return tokens.copy_(logits.argmax(dim=-1)).double()

    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        counters = torch.zeros(3, batch, dtype=torch.int64, device=device)
        named = dict(zip(("tokens", "lengths", "steps"), counters, strict=True))
        recent = torch.zeros(2, 8, batch, dtype=torch.float64, device=device)
        return draw(logits=(batch, s.V))(device, dtype) | named | {"recent": recent}

    cost = Cost(2.0 * batch * s.V)
    return OpCase("decode_greedy", f"{s.name} B{batch} V{s.V}", run, plain, inputs, cost)


def cases_at(s: Sizes, decode_batches: Sequence[int], *, on_kernels: bool) -> list[OpCase]:
    """Every op at one size; ``on_kernels`` adds the forms that only the kernels have."""
    cases = [_attention(s, 0.0), _add_layer_norm(s), _add_branch(s), _layer_norm(s)]
    cases += [_bias_gelu(s), _linear_gelu(s, fused=False)]
    cases += [_cross_entropy(s), _linear_cross_entropy(s), _embedding(s)]
    for batch in decode_batches:
        cases += [_append_kv(s, batch), _decode_attention(s, batch), _decode_greedy(s, batch)]
        if batch <= MAX_ROWS:
            cases += [_decode_linear(s, batch), _decode_qkv(s, batch), _decode_head(s, batch)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if on_kernels and no_fp8_kernel(torch.empty(0, device=device))() is None:
        cases.append(_quantize_fp8(s))
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
