"""Queries, keys and values of the new tokens; keys and values go straight into the cache.

``decode_linear``'s product with another end: feature f of the 3 H D is number f mod H D of the
queries, the keys or the values. Queries are stored as they are; keys and values go to the place
after the tokens that the row has in the cache. Every program reads the lengths, which say where
that is, and none changes them. A row without a place writes nothing.

Grid (cdiv(3 H D, BLOCK_F), cdiv(B, BLOCK_B)), tiles of ``decode_linear``. Bytes: the weights once
per block of rows; rows and outputs are small. FLOPs 6 B H D C. Nothing is saved.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels import tuning
from fastgpt2.kernels.cases import CompileCase, Work, case, configs
from fastgpt2.kernels.jit.decode_linear import product_tile, tile_offsets
from fastgpt2.kernels.jit.launch import launch_kernel
from fastgpt2.kernels.reference import Beside


@triton.jit
def _decode_qkv_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    bias_ptr,
    norm,
    norm_bias_ptr,
    q_ptr,
    cache,
    strides,
    shape,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    B, H, C, S = shape
    offs_b, offs_f = tile_offsets(BLOCK_B, BLOCK_F)
    y = product_tile(
        x_ptr,
        weight_ptr,
        scales_ptr,
        bias_ptr,
        norm,
        norm_bias_ptr,
        (offs_b, offs_f),
        strides,
        (B, 3 * H * D, C),
        BLOCK_B,
        BLOCK_F,
        BLOCK_C,
    )
    mask_b = offs_b < B
    mask = mask_b[:, None] & (offs_f < H * D)[None, :]
    tl.store(q_ptr + offs_b[:, None] * (H * D) + offs_f[None, :], y, mask=mask)
    slot = tl.load(cache[2] + offs_b, mask=mask_b, other=-1).to(tl.int64)
    fits = (slot >= 0) & (slot < S)
    # keys, then values; their strides come after those of x and the weights
    for part in tl.static_range(2):
        feature = offs_f - (part + 1) * H * D
        row = offs_b * strides[2 + 3 * part] + slot * strides[4 + 3 * part]
        within = feature // D * strides[3 + 3 * part] + feature % D
        mask = fits[:, None] & ((feature >= 0) & (feature < H * D))[None, :]
        tl.store(cache[part] + row[:, None] + within[None, :], y, mask=mask)


def launch(
    x: Tensor,
    weight: Tensor,
    beside: Beside,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    eps: float,
) -> Tensor:
    """q (B, H, D) in the caches' dtype; the caches (B, H, S, D) take keys and values."""
    (B, C), (H, S, D) = x.shape, k_cache.shape[1:]
    q = k_cache.new_empty(B, H, D)
    if q.numel() == 0:
        return q
    config = tuning.pick(
        "decode_linear",
        tuning.arch_of(x.device),
        rows=B,
        F=weight.shape[0],
        bytes=weight.element_size(),
    )
    launch_kernel(
        _decode_qkv_kernel,
        (triton.cdiv(weight.shape[0], config["BLOCK_F"]), triton.cdiv(B, config["BLOCK_B"])),
        x,
        weight,
        beside.scales,
        beside.bias,
        None if beside.norm_weight is None else (beside.norm_weight, eps),
        beside.norm_bias,
        q,
        (k_cache, v_cache, lengths),
        (x.stride(0), weight.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3]),
        (B, H, C, S),
        D=D,
        **config.meta(),
    )
    return q


def _case(config: tuning.Config, dtype: str) -> CompileCase:
    H, D, B = 12, 64, config["BLOCK_B"]
    C, F = H * D, 3 * H * D
    arguments = {
        **dict.fromkeys(("x_ptr", "bias_ptr", "norm_bias_ptr", "q_ptr"), "*bf16"),
        "weight_ptr": "*i8" if dtype == "int8" else "*bf16",
        "scales_ptr": "*fp32" if dtype == "int8" else None,
        "norm": ("*bf16", "fp32"),
        "cache": ("*bf16", "*bf16", "*i64"),
        "strides": ("i32",) * 8,
        # one row: Triton specialises on it
        "shape": ("constexpr" if B == 1 else "i32", "i32", "i32", "i32"),
        "D": D,
    }
    return case(
        _decode_qkv_kernel,
        "decode_qkv",
        config,
        f"D{D} {dtype}",
        arguments,
        bytes=float(F * C * (1 if dtype == "int8" else 2)),
        flops=2.0 * B * F * C,
        # per weight: a product with the same column of each row
        work=Work(float(F * C), config["BLOCK_F"] * config["BLOCK_C"], F // config["BLOCK_F"]),
        odd=("shape.0", "shape.1", "norm.1"),
    )


def compile_cases(arch: str) -> list[CompileCase]:
    """A block's first layer at GPT-2 124M, with weights in int8 or bf16."""
    return [
        _case(config, "int8" if limits.get("bytes") == 1 else "bf16")
        for limits, config in configs("decode_linear", arch)
        # narrow outputs are no queries, keys and values
        if "F" not in limits
    ]
