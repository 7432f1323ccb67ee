"""A linear layer of a few rows, with LayerNorm before it and bias, GELU and addition after it.

A program computes BLOCK_F features of BLOCK_B rows. With a LayerNorm it first walks twice over the
rows, which are in cache, for their means and variances; every program repeats this, since another
launch would cost more. Then it walks over the weights BLOCK_C columns at a time, loading the next
tiles ahead. A matrix unit would have few rows of work: the product is a multiplication and a sum.
Each lane sums its own products, and the lanes are added once, at the end. All of it is fp32,
rounded once at the store.

Grid (cdiv(F, BLOCK_F), cdiv(B, BLOCK_B)). Bytes: the weights once per block of rows, F C in int8
and 2 F C in bf16; rows and outputs are small. FLOPs 2 B F C. Nothing is saved.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels import tuning
from fastgpt2.kernels.cases import SIZES, CompileCase, Work, case, configs
from fastgpt2.kernels.jit.gelu import gelu_tile
from fastgpt2.kernels.jit.launch import launch_kernel
from fastgpt2.kernels.reference import Beside

# tiles of weights that are loaded ahead
PREFETCH = tl.constexpr(3)
# values of FORM
_FORMS = {"none": 0, "tanh": 1, "erf": 2}


@triton.jit
def _statistics(x_ptrs, mask_b, C, eps, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and 1 / sqrt(var + eps) of each row, [BLOCK_B]; ``x_ptrs`` [BLOCK_B, 1] begin them."""
    offs_c = tl.arange(0, BLOCK_C)[None, :]
    sums = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for first in range(0, C, BLOCK_C):
        mask = mask_b[:, None] & (first + offs_c < C)
        sums += tl.load(x_ptrs + first + offs_c, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(sums, 1) / C
    squares = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for first in range(0, C, BLOCK_C):
        mask = mask_b[:, None] & (first + offs_c < C)
        x = tl.load(x_ptrs + first + offs_c, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - mean[:, None], 0.0)
        squares += centred * centred
    return mean, tl.rsqrt(tl.sum(squares, 1) / C + eps)


@triton.jit
def _load_affine(norm, norm_bias_ptr, offs_c, C):
    """Weight and bias of the LayerNorm, each [1, BLOCK_C]."""
    weight = tl.load(norm[0] + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
    bias = tl.zeros_like(weight)
    if norm_bias_ptr is not None:
        bias = tl.load(norm_bias_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
    return weight[None, :], bias[None, :]


@triton.jit
def product_tile(
    x_ptr,
    weight_ptr,
    scales_ptr,
    bias_ptr,
    norm,
    norm_bias_ptr,
    offs,
    strides,
    shape,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """scales (W norm(x)) + bias at rows ``offs[0]`` and features ``offs[1]``, [BLOCK_B, BLOCK_F].

    ``strides`` are those of a row of x and of the weights, ``shape`` is (B, F, C).
    """
    offs_b, offs_f = offs
    B, F, C = shape
    mask_f, mask_b, offs_c = offs_f < F, offs_b < B, tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + offs_b[:, None] * strides[0]
    weight_ptrs = weight_ptr + offs_f[:, None] * strides[1]
    if norm is not None:
        mean, rstd = _statistics(x_ptrs, mask_b, C, norm[1], BLOCK_B, BLOCK_C)
    acc = tl.zeros([BLOCK_B, BLOCK_F, BLOCK_C], tl.float32)
    for first in tl.range(0, C, BLOCK_C, num_stages=PREFETCH):
        cols = first + offs_c
        w = tl.load(
            weight_ptrs + cols[None, :], mask=mask_f[:, None] & (cols < C)[None, :], other=0.0
        )
        x = tl.load(x_ptrs + cols[None, :], mask=mask_b[:, None] & (cols < C)[None, :], other=0.0)
        x = x.to(tl.float32)
        if norm is not None:
            # where there is no column, the weights are zero
            scale, shift = _load_affine(norm, norm_bias_ptr, cols, C)
            x = (x - mean[:, None]) * rstd[:, None] * scale + shift
        acc += x[:, None, :] * w.to(tl.float32)[None, :, :]
    y = tl.sum(acc, 2)
    if scales_ptr is not None:
        y *= tl.load(scales_ptr + offs_f, mask=mask_f, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_f, mask=mask_f, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def tile_offsets(BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr):
    """The rows and features of this program, [BLOCK_B] and [BLOCK_F]."""
    offs_b = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    return offs_b, tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)


@triton.jit
def _decode_linear_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    bias_ptr,
    norm,
    norm_bias_ptr,
    residual_ptr,
    out_ptr,
    strides,
    shape,
    FORM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_b, offs_f = tile_offsets(BLOCK_B, BLOCK_F)
    F = shape[1]
    y = product_tile(
        x_ptr,
        weight_ptr,
        scales_ptr,
        bias_ptr,
        norm,
        norm_bias_ptr,
        (offs_b, offs_f),
        strides,
        shape,
        BLOCK_B,
        BLOCK_F,
        BLOCK_C,
    )
    if FORM == 1:
        y = gelu_tile(y, False)
    elif FORM == 2:
        y = gelu_tile(y, True)
    mask = (offs_b < shape[0])[:, None] & (offs_f < F)[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + offs_b[:, None] * strides[2] + offs_f[None, :]
        y += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_b[:, None] * F + offs_f[None, :], y, mask=mask)


def launch(
    x: Tensor, weight: Tensor, beside: Beside, *, eps: float, form: str, dtype: torch.dtype
) -> Tensor:
    """y (B, F) in ``dtype``, of x (B, C) and weight (F, C); rows of all have adjacent elements."""
    (B, C), F = x.shape, weight.shape[0]
    out = x.new_empty(B, F, dtype=dtype)
    if out.numel() == 0:
        return out
    arch = tuning.arch_of(x.device)
    config = tuning.pick("decode_linear", arch, rows=B, F=F, bytes=weight.element_size())
    residual = beside.residual
    launch_kernel(
        _decode_linear_kernel,
        (triton.cdiv(F, config["BLOCK_F"]), triton.cdiv(B, config["BLOCK_B"])),
        x,
        weight,
        beside.scales,
        beside.bias,
        None if beside.norm_weight is None else (beside.norm_weight, eps),
        beside.norm_bias,
        residual,
        out,
        (x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0)),
        (B, F, C),
        FORM=_FORMS[form],
        **config.meta(),
    )
    return out


# kind of layer -> (F, C) at GPT-2 124M
_LAYERS = {"LN+FC+GELU": (3072, 768), "FC2+residual": (768, 3072)}


def _case(config: tuning.Config, layer: str, dtype: str) -> CompileCase:
    (F, C), B = _LAYERS[layer], config["BLOCK_B"]
    floating = "bf16" if dtype == "int8" else dtype
    normed = layer.startswith("LN")
    arguments = {
        **dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), f"*{floating}"),
        "weight_ptr": "*i8" if dtype == "int8" else f"*{dtype}",
        "scales_ptr": "*fp32" if dtype == "int8" else None,
        "norm": (f"*{floating}", "fp32") if normed else None,
        "norm_bias_ptr": f"*{floating}" if normed else None,
        "residual_ptr": None if normed else f"*{floating}",
        "strides": ("i32", "i32", "i32"),
        # one row: Triton specialises on it
        "shape": ("constexpr" if B == 1 else "i32", "i32", "i32"),
        "FORM": _FORMS["tanh" if "GELU" in layer else "none"],
    }
    turn = config["BLOCK_F"] * config["BLOCK_C"]
    return case(
        _decode_linear_kernel,
        "decode_linear",
        config,
        f"{layer} {dtype}",
        arguments,
        bytes=float(F * C * (1 if dtype == "int8" else SIZES[dtype])),
        flops=2.0 * B * F * C,
        # per weight: a product with the same column of each row
        work=Work(float(F * C), turn, F // config["BLOCK_F"]),
        odd=("shape.0", "norm.1"),
    )


def compile_cases(arch: str) -> list[CompileCase]:
    """The layers of a block at GPT-2 124M, in int8 or bf16, and one of them in fp32."""
    cases = []
    for limits, config in configs("decode_linear", arch):
        dtype = "int8" if limits.get("bytes") == 1 else "bf16"
        widest = limits.get("F")
        fitting = [n for n, (F, _) in _LAYERS.items() if widest is None or F <= widest]
        cases += [_case(config, layer, dtype) for layer in fitting]
        if dtype == "bf16":
            cases.append(_case(config, "FC2+residual", "fp32"))
    return cases
