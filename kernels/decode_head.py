"""The head of a decoding step, and the greedy choice: two launches from hidden states to tokens."""

from typing import Any

import torch
from torch import Tensor

from fastgpt2.kernels import checks, reference
from fastgpt2.kernels.backend import Impl, resolve
from fastgpt2.kernels.decode_linear import NO_GELU, adjacent, by_library, check_layer, obstacle
from fastgpt2.kernels.reference import VOCAB_BLOCK, Beside


@torch.library.custom_op("fastgpt2::decode_head", mutates_args=())
def _decode_head(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Logits (B, V) in ``dtype``, tops (B, cdiv(V, VOCAB_BLOCK)) in fp32."""
    from fastgpt2.kernels.jit import decode_head as jit

    beside = Beside(scales, bias, norm_weight, norm_bias, None)
    return jit.launch(x, weight, beside, eps=eps, dtype=dtype)


@_decode_head.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, V = x.shape[0], weight.shape[0]
    # the dtype comes last
    logits = x.new_empty((B, V), dtype=rest[-1])
    return logits, x.new_empty((B, -(-V // VOCAB_BLOCK)), dtype=torch.float32)


@torch.library.custom_op(
    "fastgpt2::decode_greedy", mutates_args=("tokens", "lengths", "steps", "recent")
)
def _decode_greedy(
    logits: Tensor,
    tops: Tensor | None,
    tokens: Tensor,
    lengths: Tensor,
    steps: Tensor,
    recent: Tensor,
) -> None:
    from fastgpt2.kernels.jit import decode_head as jit

    jit.launch_greedy(logits, tops, tokens, lengths, steps, recent)


@_decode_greedy.register_fake
def _(*arguments: Any) -> None:
    return None


@torch.no_grad()
def decode_head(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``decode_linear`` to logits, and with them the largest of every VOCAB_BLOCK = 8.

    tops[b, j] = max(logits[b, 8 j], ..., logits[b, 8 j + 7]) of the logits as they are rounded; NaN
    counts as +inf. The k largest logits of a row are in the blocks of its k largest tops, so that
    a choice has an eighth of the numbers to read. No gradient flows.

    Args:
        x: (B, C). Above ``MAX_ROWS`` rows, ``auto`` takes the library and ``triton`` refuses.
        weight: (V, C), floating point or int8.
        bias: (V,) or None.
        scales: (V,), the scales of int8 weights; None means 1.
        norm_weight: (C,), gamma of the LayerNorm of x before the product; None means no LayerNorm.
        norm_bias: (C,), beta, or None.
        eps: epsilon of the LayerNorm, positive.
        dtype: dtype of the logits; None means that of x.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        Logits (B, V), and tops (B, cdiv(V, 8)) in fp32.

    Raises:
        ValueError: a shape, device or eps does not fit.
        TypeError: a tensor is not floating point (weight may be int8), or dtype is not.
        RuntimeError: ``triton`` was asked for and cannot run.
    """
    op = "decode_head"
    beside = Beside(scales, bias, norm_weight, norm_bias, None)
    check_layer(op, x, weight, beside)
    checks.check_positive(op, "eps", eps)
    dtype = x.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"{op}: dtype must be floating point, got {dtype}")
    match resolve(op, impl, x, lambda: obstacle(x)):
        case Impl.REFERENCE:
            logits = reference.decode_linear(x, weight, beside, eps, NO_GELU).to(dtype)
            return logits, reference.block_tops(logits)
        case Impl.TORCH:
            logits = by_library(x, weight, beside, eps, NO_GELU, dtype)
            return logits, reference.block_tops(logits)
    tensors = [None if t is None else adjacent(t) for t in (x, weight, *beside[:4])]
    out: tuple[Tensor, Tensor] = _decode_head(*tensors, eps, dtype)
    return out


@torch.no_grad()
def decode_greedy(
    logits: Tensor,
    tops: Tensor | None,
    tokens: Tensor,
    lengths: Tensor,
    steps: Tensor,
    recent: Tensor,
    *,
    impl: str = "auto",
) -> None:
    """The greedy choice, kept on the device: tokens[b] = argmax_v logits[b, v] for rows in use.

    In use are the rows with steps[b] >= 0. Of those, recent[0, steps[b], b] = tokens[b] and
    recent[1, steps[b], b] = that logit, if ``recent`` has the step; then lengths[b] and steps[b]
    grow by 1. Of equal logits the first is taken. NaN counts as +inf: it is taken, and seen.

    Args:
        logits: (B, V).
        tops: what ``decode_head`` gives with them, (B, cdiv(V, 8)); None: all logits are read.
        tokens: (B,) integers, each row's newest token.
        lengths: (B,) integers, tokens of each row in the cache.
        steps: (B,) integers, how many tokens a row has got since the host looked.
        recent: (2, steps, B), the chosen tokens and their logits, in a dtype that holds both.
        impl: ``auto``, ``triton``, ``torch`` or ``reference``.

    Raises:
        ValueError: a shape, device or stride does not match.
        TypeError: logits, tops or recent are not floating point, or the others not integers.
    """
    op = "decode_greedy"
    checks.check_vectors(op, "logits", logits)
    checks.check_dim(op, "logits", logits, 2, "(B, V)")
    (B, V), matched = logits.shape, f"logits {tuple(logits.shape)}"
    if tops is not None:
        checks.check_floating(op, "tops", tops)
        checks.check_shape(op, "tops", tops, (B, -(-V // VOCAB_BLOCK)), matched)
        checks.check_same_device(op, "tops", tops, logits.device)
    counters = {"tokens": tokens, "lengths": lengths, "steps": steps}
    for name, x in counters.items():
        checks.check_integer(op, name, x)
        checks.check_shape(op, name, x, (B,), matched)
    checks.check_floating(op, "recent", recent)
    checks.check_dim(op, "recent", recent, 3, "(2, steps, B)")
    checks.check_shape(op, "recent", recent, (2, recent.shape[1], B), matched)
    for name, x in (*counters.items(), ("recent", recent)):
        checks.check_same_device(op, name, x, logits.device)
        checks.check_contiguous(op, name, x)
    match resolve(op, impl, logits):
        case Impl.REFERENCE | Impl.TORCH:
            after = reference.decode_greedy(logits, tokens, lengths, steps, recent)
            for x, new in zip((tokens, lengths, steps, recent), after, strict=True):
                x.copy_(new)
        case _:
            tops = None if tops is None else tops.contiguous()
            _decode_greedy(adjacent(logits), tops, tokens, lengths, steps, recent)
