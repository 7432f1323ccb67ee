"""What every op means: the formulas in plain PyTorch, computed in fp32 (fp64 for fp64 inputs).

The oracle of the tests and the implementation named ``reference``: allowed to be slow, not to be
clever. Gradients come from autograd through these very lines. Shapes: B batch, T query tokens,
S key tokens, H heads, D head size, C width, V vocabulary, N rows.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt2.kernels import philox


def up(x: Tensor) -> Tensor:
    """The tensor in the dtype that the formulas are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, per row of C; var is the biased one."""
    xf = up(x)
    centred = xf - xf.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    y = centred * rstd * up(weight)
    return (y if bias is None else y + up(bias)).to(x.dtype)


def add_branch(
    x: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """x + dropout(branch + branch_bias), in x's dtype."""
    update = up(branch)
    if branch_bias is not None:
        update = update + up(branch_bias)
    if seed is not None:
        update = philox.dropout(update, dropout_p, seed)
    return (up(x) + update).to(x.dtype)


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """s = x + dropout(branch + branch_bias); returns (s, layer_norm(s)).

    s has x's dtype, and it is this rounded s that is normalised; the norm has branch's dtype.
    """
    stream = add_branch(x, branch, branch_bias, dropout_p, seed)
    return stream, layer_norm(up(stream), weight, bias, eps).to(branch.dtype)


def gelu(x: Tensor, form: str = "tanh") -> Tensor:
    """y = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), or x/2 * (1 + erf(x / sqrt(2)))."""
    xf = up(x)
    if form == "erf":
        return (0.5 * xf * (1.0 + torch.erf(xf * math.sqrt(0.5)))).to(x.dtype)
    inner = math.sqrt(2.0 / math.pi) * (xf + 0.044715 * xf * xf * xf)
    return (0.5 * xf * (1.0 + torch.tanh(inner))).to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor, form: str = "tanh") -> Tensor:
    """gelu(x + bias), the sum not rounded in between."""
    return gelu(up(x) + up(bias), form).to(x.dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, form: str = "tanh") -> Tensor:
    """gelu(x @ weight.T + bias), the pre-activation not rounded in between."""
    z = up(x) @ up(weight).T
    return gelu(z if bias is None else z + up(bias), form).to(x.dtype)


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    form: str = "tanh",
) -> Tensor:
    """gelu(x @ fc_weight.T + fc_bias) @ proj_weight.T, nothing rounded in between."""
    hidden = linear_gelu(up(x), fc_weight, fc_bias, form)
    return (hidden @ up(proj_weight).T).to(x.dtype)


def visible_keys(
    T: int, segment_ids: Tensor | None, key_range: Tensor | None, device: torch.device
) -> Tensor:
    """(B or 1, 1, T, T) bool: query t sees key s if s <= t, in the same document, in range."""
    positions = torch.arange(T, device=device)
    visible = (positions[None, :] <= positions[:, None])[None]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, :, None] == segment_ids[:, None, :])
    if key_range is not None:
        start, end = key_range[:, 0, None, None], key_range[:, 1, None, None]
        visible = visible & (positions >= start) & (positions < end)
    return visible[:, None]


def masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible keys; a row that sees none is all zeros."""
    scores = scores.masked_fill(~visible, -torch.inf)
    # a row of only -inf would give NaN, in the gradient too
    blind = ~visible.any(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed (B, T, 3C) as three views (B, H, T, D)."""
    B, T, three_C = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, three_C // (3 * n_head)).permute(2, 0, 3, 1, 4)
    return q, k, v


def attention(
    qkv: Tensor,
    n_head: int,
    dropout_p: float,
    seed: Tensor | None,
    segment_ids: Tensor | None,
    key_range: Tensor | None,
    scale: float,
) -> Tensor:
    """softmax(scale * q k^T over visible keys) with dropout, times v; heads side by side."""
    B, T, three_C = qkv.shape
    q, k, v = split_heads(up(qkv), n_head)
    visible = visible_keys(T, segment_ids, key_range, qkv.device)
    probabilities = masked_softmax(q @ k.transpose(-2, -1) * scale, visible)
    if seed is not None:
        probabilities = philox.dropout(probabilities, dropout_p, seed)
    out = probabilities @ v
    return out.transpose(1, 2).reshape(B, T, three_C // 3).to(qkv.dtype)


def append_kv(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Copies of the caches (B, H, S, D) with k and v (B, T, H, D) at ``lengths[b] + t``."""
    new_k, new_v = k_cache.clone(), v_cache.clone()
    for b, length in enumerate(lengths.tolist()):
        for t in range(k.shape[1]):
            new_k[b, :, length + t] = k[b, t]
            new_v[b, :, length + t] = v[b, t]
    return new_k, new_v


class Beside(NamedTuple):
    """The optional operands of ``decode_linear`` and ``decode_qkv``."""

    scales: Tensor | None
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    residual: Tensor | None


def decode_linear(x: Tensor, weight: Tensor, beside: Beside, eps: float, form: str) -> Tensor:
    """residual + gelu(scales * (layer_norm(x) @ weight.T) + bias), not rounded."""
    scales, bias, norm_weight, norm_bias, residual = beside
    y = up(x) if norm_weight is None else layer_norm(up(x), norm_weight, norm_bias, eps)
    y = y @ weight.to(y.dtype).T
    if scales is not None:
        y = y * scales.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    if form != "none":
        y = gelu(y, form)
    return y if residual is None else residual.to(y.dtype) + y


def decode_qkv(
    x: Tensor,
    weight: Tensor,
    beside: Beside,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, D), not rounded, and copies of the caches with the new keys and values."""
    B, H, S, D = k_cache.shape
    q, k, v = decode_linear(x, weight, beside, eps, "none").view(B, 3, H, D).unbind(1)
    # (B, 1, S, 1): a row that is full has no place for them
    here = (torch.arange(S, device=x.device) == lengths[:, None])[:, None, :, None]
    return q, torch.where(here, k[:, :, None], k_cache), torch.where(here, v[:, :, None], v_cache)


# of so many adjacent logits the largest is kept
VOCAB_BLOCK = 8


def _or_inf(x: Tensor) -> Tensor:
    """fp32, NaN as +inf."""
    return x.float().masked_fill(x.isnan(), math.inf)


def block_tops(logits: Tensor) -> Tensor:
    """(B, cdiv(V, VOCAB_BLOCK)): the largest of every VOCAB_BLOCK logits (B, V), in fp32."""
    B, V = logits.shape
    padded = torch.nn.functional.pad(_or_inf(logits), (0, -V % VOCAB_BLOCK), value=-math.inf)
    return padded.view(B, -(-V // VOCAB_BLOCK), VOCAB_BLOCK).amax(-1)


def decode_greedy(
    logits: Tensor, tokens: Tensor, lengths: Tensor, steps: Tensor, recent: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four after the greedy choice from logits (B, V), of the rows with steps >= 0."""
    best, ids = _or_inf(logits).max(dim=1)
    used = steps >= 0
    # (steps, B): no step of a row that is not in use is here
    here = torch.arange(recent.shape[1], device=steps.device)[:, None] == steps
    chosen = torch.stack([ids.to(recent.dtype), best.to(recent.dtype)])[:, None]
    counted = used.to(lengths.dtype)
    return (
        torch.where(used, ids, tokens),
        lengths + counted,
        steps + counted,
        torch.where(here, chosen, recent),
    )


def visible_in_cache(T: int, S: int, lengths: Tensor) -> Tensor:
    """(B, 1, T, S) bool: query t of row b sees the keys up to its own, at ``lengths[b] + t``."""
    own = lengths[:, None] + torch.arange(T, device=lengths.device)
    return (torch.arange(S, device=lengths.device) <= own[:, :, None])[:, None]


def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """T queries per row, (B, T, H, D), over the keys of a (B, H, S, D) cache up to their own."""
    scores = (up(q).transpose(1, 2) @ up(k).transpose(-2, -1)) * scale
    visible = visible_in_cache(q.shape[1], k.shape[2], lengths)
    # values that no query of a row sees may be NaN: zero times them must stay zero
    values = up(v).masked_fill(~visible.any(2)[..., None], 0.0)
    out = masked_softmax(scores, visible) @ values
    return out.transpose(1, 2).to(q.dtype)


def embedding(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor,
    positions: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """dropout(wte[idx] + wpe[positions]), (B, T, C)."""
    x = up(wte[idx]) + up(wpe[positions])
    if seed is not None:
        x = philox.dropout(x, dropout_p, seed)
    return x.to(dtype)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Mean over the targets kept of (1-s)(lse - z_y) + s(lse - mean_v z_v) + z_loss lse^2.

    s is the label smoothing, lse = log sum exp over the true vocabulary; 0 if no target is kept.
    """
    z = up(logits)[:, :vocab_size]
    kept = targets != ignore_index
    lse = torch.logsumexp(z, dim=-1)
    picked = z.gather(1, targets.masked_fill(~kept, 0).long()[:, None])[:, 0]
    rows = lse - (1.0 - label_smoothing) * picked + z_loss * lse.square()
    if label_smoothing > 0:
        # only then: a logit of -inf excludes its token, and zero times that mean would be NaN
        rows = rows - label_smoothing * z.mean(dim=-1)
    return rows.masked_fill(~kept, 0.0).sum() / kept.sum().clamp(min=1)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """cross_entropy(x @ weight.T, targets)."""
    logits = up(x) @ up(weight).T
    return cross_entropy(logits, targets, ignore_index, vocab_size, label_smoothing, z_loss)
