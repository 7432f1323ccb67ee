"""Rung 8: the weights of each attention carried to the next, and what each of them costs.

Each ``..._to_...`` makes the next rung with the weights of the one it is given: the two then give
the same numbers, up to the order of additions.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastgpt2.ladder.fused_attention import (
    KernelMultiHeadAttention,
    PackedMultiHeadAttention,
    SDPAMultiHeadAttention,
)
from fastgpt2.ladder.multi_head import MultiHeadAttention, MultiHeadAttentionWrapper, head_size
from fastgpt2.ladder.self_attention import CausalAttention, SelfAttentionV1, SelfAttentionV2

_PROJECTIONS = ("W_query", "W_key", "W_value")

Module = TypeVar("Module", bound=nn.Module)
Packed = TypeVar("Packed", bound=PackedMultiHeadAttention)


def _filled(module: Module, state: Mapping[str, Tensor], like: nn.Module) -> Module:
    """``module`` with these weights, where and in what dtype the weights of ``like`` are."""
    weight = next(like.parameters())
    module.to(weight.device, weight.dtype)
    missing, unexpected = module.load_state_dict(state, strict=False)
    # masks are not weights: each rung makes its own
    assert not unexpected and all(name.endswith("mask") for name in missing)
    return module.train(like.training)


def _projections(module: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in module.state_dict().items() if k.startswith(_PROJECTIONS)}


def simple_to_v1(width: int, dtype: torch.dtype = torch.float32) -> SelfAttentionV1:
    """A ``SelfAttentionV1`` that equals ``simple_attention`` on tokens of that width.

    Keys and values are the tokens themselves; the queries undo the division by sqrt(D).
    """
    v1, one = SelfAttentionV1(width, width).to(dtype), torch.eye(width, dtype=dtype)
    return _filled(v1, {"W_query": one * math.sqrt(width), "W_key": one, "W_value": one}, v1)


def v1_to_v2(v1: SelfAttentionV1) -> SelfAttentionV2:
    """The same projections as linear layers, which store the transpose."""
    state = {f"{name}.weight": getattr(v1, name).T for name in _PROJECTIONS}
    return _filled(SelfAttentionV2(*v1.W_query.shape), state, v1)


def v2_to_causal(v2: SelfAttentionV2, context_length: int, dropout: float = 0.0) -> CausalAttention:
    """The same projections with a mask: row t is ``v2``'s last row on the first t + 1 tokens."""
    d_out, d_in = v2.W_query.weight.shape
    has_bias = v2.W_query.bias is not None
    return _filled(
        CausalAttention(d_in, d_out, context_length, dropout, has_bias), _projections(v2), v2
    )


def causal_to_wrapper(causal: CausalAttention, num_heads: int = 1) -> MultiHeadAttentionWrapper:
    """The projections cut into ``num_heads`` slices, one a head; one head is ``causal`` itself."""
    d_out, d_in = causal.W_query.weight.shape
    wrapper = MultiHeadAttentionWrapper(
        d_in,
        head_size(d_out, num_heads),
        len(causal.mask),
        causal.dropout.p,
        num_heads,
        causal.W_query.bias is not None,
    )
    slices = {name: tensor.chunk(num_heads) for name, tensor in _projections(causal).items()}
    state = {
        f"heads.{i}.{name}": parts[i] for name, parts in slices.items() for i in range(num_heads)
    }
    return _filled(wrapper, state, causal)


def wrapper_to_multi_head(wrapper: MultiHeadAttentionWrapper) -> MultiHeadAttention:
    """The heads' projections stacked into one; the output projection leaves all as it is."""
    heads = wrapper.heads
    first = heads[0]
    assert isinstance(first, CausalAttention)
    d_head, d_in = first.W_query.weight.shape
    d_out = d_head * len(heads)
    multi_head = MultiHeadAttention(
        d_in, d_out, len(first.mask), first.dropout.p, len(heads), first.W_query.bias is not None
    )
    parts = [_projections(head) for head in heads]
    state = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    identity = {"out_proj.weight": torch.eye(d_out), "out_proj.bias": torch.zeros(d_out)}
    return _filled(multi_head, state | identity, wrapper)


def multi_head_to_packed(multi_head: MultiHeadAttention) -> PackedMultiHeadAttention:
    """The three projections stacked into one."""
    state = multi_head.state_dict()
    has_bias = multi_head.W_query.bias is not None
    packed = PackedMultiHeadAttention(
        multi_head.W_query.in_features,
        multi_head.W_query.out_features,
        len(multi_head.mask),
        multi_head.dropout.p,
        multi_head.num_heads,
        has_bias,
    )
    qkv = {
        f"qkv.{kind}": torch.cat([state[f"{name}.{kind}"] for name in _PROJECTIONS])
        for kind in ("weight", "bias")[: 1 + has_bias]
    }
    out = {name: state[name] for name in ("out_proj.weight", "out_proj.bias")}
    return _filled(packed, qkv | out, multi_head)


def packed_to(fused: type[Packed], packed: PackedMultiHeadAttention) -> Packed:
    """The same weights in another way to compute the attention: SDPA, or this package's op."""
    module = fused(
        packed.qkv.in_features,
        packed.out_proj.in_features,
        packed.context_length,
        packed.dropout.p,
        packed.num_heads,
        packed.qkv.bias is not None,
    )
    return _filled(module, packed.state_dict(), packed)


def attention_rungs(width: int, context_length: int, num_heads: int) -> list[nn.Module]:
    """All attentions, ``SelfAttentionV1`` to ``KernelMultiHeadAttention``, with the same weights.

    From the wrapper on the projections are cut into heads: another function than with one head,
    of the same number of weights; from there on all compute the same.
    """
    v1 = SelfAttentionV1(width, width)
    for parameter in v1.parameters():
        # scores of variance 1, as in a network that is about to be trained
        nn.init.normal_(parameter, std=width**-0.5)
    v2 = v1_to_v2(v1)
    causal = v2_to_causal(v2, context_length)
    wrapper = causal_to_wrapper(causal, num_heads)
    multi_head = wrapper_to_multi_head(wrapper)
    packed = multi_head_to_packed(multi_head)
    fused = [packed_to(kind, packed) for kind in (SDPAMultiHeadAttention, KernelMultiHeadAttention)]
    return [v1, v2, causal, wrapper, multi_head, packed, *fused]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one rung, medians; ``difference`` is from the rung above, None if it is not
    meant to compute the same. ``both_ms`` has the gradients of tokens and weights, too."""

    name: str
    forward_ms: float
    both_ms: float
    difference: float | None


def time_rungs(
    rungs: Sequence[Callable[[Tensor], Tensor]], x: Tensor, repeats: int
) -> list[Timing]:
    """Time forward alone, and forward with backward, of each rung on the tokens ``x`` (B, T, C)."""
    timings = []
    above: Tensor | None = None
    for rung in rungs:
        with torch.no_grad():
            out = rung(x)
        # weights, the mask, and the cut into heads each begin another function
        same = above is not None and not isinstance(
            rung, SelfAttentionV1 | CausalAttention | MultiHeadAttentionWrapper
        )
        difference = (out - above).abs().max().item() if same and above is not None else None
        above = out
        timings.append(
            Timing(
                getattr(rung, "__name__", type(rung).__name__),
                _median_ms(rung, x, repeats, backward=False),
                _median_ms(rung, x, repeats, backward=True),
                difference,
            )
        )
    return timings


def _median_ms(
    rung: Callable[[Tensor], Tensor], x: Tensor, repeats: int, *, backward: bool
) -> float:
    x = x.detach().requires_grad_()
    weights = list(rung.parameters()) if isinstance(rung, nn.Module) else []
    times = []
    for _ in range(repeats + 1):
        _wait(x)
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            out = rung(x)
            if backward:
                torch.autograd.grad(out.sum(), [x, *weights])
        _wait(x)
        times.append(1000 * (time.perf_counter() - start))
    # the first one warms up
    return median(times[1:])


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def format_timings(timings: list[Timing]) -> str:
    """A Markdown table, one rung a row."""
    rows = [
        "| rung | forward, ms | with backward, ms | largest difference from the rung above |",
        "|---|---:|---:|---:|",
    ]
    for t in timings:
        difference = "" if t.difference is None else f"{t.difference:.1e}"
        rows.append(f"| {t.name} | {t.forward_ms:.2f} | {t.both_ms:.2f} | {difference} |")
    return "\n".join(rows)
