"""GELU in both forms, forward and backward, with or without the bias of the projection before.

The tanh form: with z = x + bias and v = 2 sqrt(2/pi) (z + 0.044715 z^3), (1 + tanh(v/2)) / 2 is
sigmoid(v), so

    y = z sigmoid(v),    dy/dz = sigmoid(v) + z sigmoid(v) sigmoid(-v) dv/dz.

Backward takes all of it from e = exp(-|v|), which cannot overflow: sigmoid(|v|) = 1 / (1 + e) and
sigmoid(-|v|) = e / (1 + e). Nothing is subtracted from 1, so the tails keep their relative
precision. At the speed of memory a GPU has some 25 instructions per element: constants are folded.

The erf form, with the distribution function P and the density p of a standard normal:

    y = z P(z),    dy/dz = P(z) + z p(z),    P(z) = (1 + erf(z / sqrt(2))) / 2.

Saved for backward are x and bias: x exists anyway, as the projection's output, and adding the bias
again is free next to reading x, while storing z would cost a pass. Bytes per element in bf16: 4
forward, 6 backward, 8 if backward recomputes y for an op that did not save it (``mlp``).

Forward: one tile [BLOCK_N, BLOCK_F] per program, in the order of memory. Backward: P x cdiv(F,
BLOCK_F) programs; each walks down its columns and keeps their sum of dz, its share of the bias
gradient, in registers; ``rows`` has the second stage.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels import tuning
from fastgpt2.kernels.cases import SIZES, CompileCase, Work, case, configs
from fastgpt2.kernels.jit.launch import launch_kernel
from fastgpt2.kernels.jit.primitives import LOG2E
from fastgpt2.kernels.jit.rows import as_rows, launch_column_sum, row_programs

# v = z (_LINEAR + _CUBIC z^2)
_LINEAR = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.07135481627260025)
_ROOT_HALF = tl.constexpr(0.7071067811865476)
# 1 / sqrt(2 pi): the density of a standard normal at 0
_PEAK = tl.constexpr(0.3989422804014327)


@triton.jit
def _log2_odds(z):
    """v log2(e): what exp2 needs, an instruction of every GPU."""
    return z * (_LINEAR * LOG2E + (_CUBIC * LOG2E) * (z * z))


@triton.jit
def reciprocal(x):
    """1 / x for positive x: the square of a reciprocal root, which is one instruction of a GPU.

    A division takes more, for ranges of x that do not occur here. Infinity gives 0.
    """
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _normal_cdf(z):
    return 0.5 * (1.0 + tl.erf(z * _ROOT_HALF))


@triton.jit
def gelu_tile(z, ERF: tl.constexpr):
    """GELU of an fp32 tile, in its erf form or its tanh form."""
    if ERF:
        y = z * _normal_cdf(z)
    else:
        y = z * reciprocal(1.0 + tl.exp2(-_log2_odds(z)))
    return y


@triton.jit
def gelu_slope(z, ERF: tl.constexpr):
    """Derivative of GELU at an fp32 tile."""
    if ERF:
        slope = _normal_cdf(z) + z * tl.exp2(z * z * (-0.5 * LOG2E)) * _PEAK
    else:
        slope = _tanh_slope(z)
    return slope


@triton.jit
def _tanh_slope(z):
    w = _log2_odds(z)
    e = tl.exp2(-tl.abs(w))
    larger = reciprocal(1.0 + e)
    smaller = e * larger
    # e is 0 long before z^2 is at its bound, and zero times infinity would be NaN
    dv = _LINEAR + (3.0 * _CUBIC) * tl.minimum(z * z, 1e4)
    return tl.where(w >= 0, larger, smaller) + z * (smaller * larger) * dv


@triton.jit
def _load_sum(x_ptrs, bias_ptr, offs_f, mask, mask_f):
    z = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_f, mask=mask_f, other=0.0).to(tl.float32)
    return z


@triton.jit
def _gelu_fwd_kernel(
    x_ptr, bias_ptr, y_ptr, x_stride, N, F,
    ERF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    pid, column_blocks = tl.program_id(0).to(tl.int64), tl.cdiv(F, BLOCK_F)
    offs_n = pid // column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_f = pid % column_blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = offs_f < F
    mask = (offs_n < N)[:, None] & mask_f[None, :]
    x_ptrs = x_ptr + offs_n[:, None] * x_stride + offs_f[None, :]
    y = gelu_tile(_load_sum(x_ptrs, bias_ptr, offs_f, mask, mask_f), ERF)
    tl.store(y_ptr + offs_n[:, None] * F + offs_f[None, :], y, mask=mask)


@triton.jit
def _gelu_bwd_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    y_ptr,
    partial_ptr,
    row_strides,
    shape,
    ERF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    N, F = shape
    dy_stride, x_stride = row_strides
    pid_n, P = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    offs_f = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = offs_f < F
    dbias = tl.zeros([BLOCK_F], tl.float32)
    for start in range(pid_n * BLOCK_N, N, P * BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = (offs_n < N)[:, None] & mask_f[None, :]
        x_ptrs = x_ptr + offs_n[:, None] * x_stride + offs_f[None, :]
        dy_ptrs = dy_ptr + offs_n[:, None] * dy_stride + offs_f[None, :]
        z = _load_sum(x_ptrs, bias_ptr, offs_f, mask, mask_f)
        dz = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32) * gelu_slope(z, ERF)
        out_offs = offs_n[:, None] * F + offs_f[None, :]
        tl.store(dx_ptr + out_offs, dz, mask=mask)
        if y_ptr is not None:
            tl.store(y_ptr + out_offs, gelu_tile(z, ERF), mask=mask)
        if partial_ptr is not None:
            dbias += tl.sum(dz, axis=0)
    if partial_ptr is not None:
        tl.store(partial_ptr + pid_n * F + offs_f, dbias, mask=mask_f)


def launch_fwd(x: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """gelu(x + bias) in the ``tanh`` or the ``erf`` form, in x's shape and dtype."""
    y = x.new_empty(x.shape)
    if x.numel() > 0:
        rows = as_rows(x)
        N, F = rows.shape
        config = tuning.pick("gelu_fwd", tuning.arch_of(x.device))
        grid = (triton.cdiv(N, config["BLOCK_N"]) * triton.cdiv(F, config["BLOCK_F"]),)
        arguments = (rows, bias, y, rows.stride(0), N, F)
        launch_kernel(_gelu_fwd_kernel, grid, *arguments, ERF=form == "erf", **config.meta())
    return y


def launch_bwd(dy: Tensor, x: Tensor, bias: Tensor | None, form: str) -> tuple[Tensor, Tensor]:
    """(dx, dbias); without a bias, dbias is empty and no sums are made."""
    return _launch_bwd(dy, x, bias, None, form)


def launch_bwd_with_y(
    dy: Tensor, x: Tensor, bias: Tensor | None, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dbias, gelu(x + bias)): recomputes the forward pass and writes its result."""
    y = x.new_empty(x.shape)
    return *_launch_bwd(dy, x, bias, y, form), y


def _launch_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, y: Tensor | None, form: str
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    if x.numel() == 0:
        return dx, dbias.zero_()
    rows, dy_rows = as_rows(x), as_rows(dy)
    N, F = rows.shape
    config = tuning.pick("gelu_bwd", tuning.arch_of(x.device), erf=int(form == "erf"))
    column_blocks = triton.cdiv(F, config["BLOCK_F"])
    P = row_programs(config, N, x.device, columns=column_blocks)
    partial = None if bias is None else x.new_empty(1, P, F, dtype=torch.float32)
    launch_kernel(
        _gelu_bwd_kernel,
        (column_blocks, P),
        dy_rows,
        rows,
        bias,
        dx,
        y,
        partial,
        (dy_rows.stride(0), rows.stride(0)),
        (N, F),
        ERF=form == "erf",
        **config.meta(),
    )
    if partial is not None:
        launch_column_sum(partial, [dbias])
    return dx, dbias


# 64 x 1024 tokens of GPT-2's MLP
_TOKENS, _F = 65536, 3072
# dtype, and whether there is a bias
_VARIANTS = (("bf16", True), ("bf16", False), ("fp32", True))


def _case(
    op: str, config: tuning.Config, dtype: str, bias: bool, with_y: bool = False, erf: bool = False
) -> CompileCase:
    arguments = {"x_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}" if bias else None, "ERF": erf}
    if op == "gelu_fwd":
        kernel, tensors = _gelu_fwd_kernel, 2
        arguments |= {"y_ptr": f"*{dtype}", "x_stride": "i32", "N": "i32", "F": "i32"}
    else:
        kernel, tensors = _gelu_bwd_kernel, 3 + with_y
        arguments |= {
            "dy_ptr": f"*{dtype}",
            "dx_ptr": f"*{dtype}",
            "y_ptr": f"*{dtype}" if with_y else None,
            "partial_ptr": "*fp32" if bias else None,
            "row_strides": ("i32", "i32"),
            "shape": ("i32", "i32"),
        }
    elements = float(_TOKENS * _F)
    turn = config["BLOCK_N"] * config["BLOCK_F"]
    return case(
        kernel,
        op,
        config,
        dtype + " bias" * bias + " y" * with_y + " erf" * erf,
        arguments,
        bytes=tensors * elements * SIZES[dtype],
        flops=15 * elements,
        work=Work(elements, turn, int(elements) // turn if op == "gelu_fwd" else None),
    )


def compile_cases(arch: str) -> list[CompileCase]:
    """Both kernels, with and without the bias, in both forms; backward also with the output."""
    cases = []
    for _, config in configs("gelu_fwd", arch):
        cases += [_case("gelu_fwd", config, dtype, bias) for dtype, bias in _VARIANTS]
        cases.append(_case("gelu_fwd", config, "bf16", True, erf=True))
    for limits, config in configs("gelu_bwd", arch):
        erf = "erf" not in limits
        variants = _VARIANTS[:1] if erf else _VARIANTS
        cases += [_case("gelu_bwd", config, dtype, bias, erf=erf) for dtype, bias in variants]
        cases.append(_case("gelu_bwd", config, "bf16", True, with_y=True, erf=erf))
    return cases
