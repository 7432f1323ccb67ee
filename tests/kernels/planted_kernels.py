"""A matrix product in a good configuration and in three bad ones, to test the report with."""

import triton
import triton.language as tl

from fastgpt2.kernels.cases import CompileCase, Work


@triton.jit
def _product_kernel(  # type: ignore[no-untyped-def]
    a_ptr,
    b_ptr,
    c_ptr,
    a_strides,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n, offs_k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_a = offs_m[:, None] * a_strides[0] + (k + offs_k)[None, :] * a_strides[1]
        b = tl.load(b_ptr + (k + offs_k)[:, None] * BLOCK_N + offs_n[None, :])
        acc = tl.dot(tl.load(a_ptr + offs_a), b, acc)
    tl.store(c_ptr + offs_m[:, None] * BLOCK_N + offs_n[None, :], acc.to(tl.bfloat16))


def _case(name: str, blocks: tuple[int, int, int], num_warps: int, num_stages: int) -> CompileCase:
    return CompileCase(
        kernel=_product_kernel,
        name="product",
        config=name,
        signature={
            "a_ptr": "*bf16",
            "b_ptr": "*bf16",
            "c_ptr": "*bf16",
            "a_strides": ("i64", "constexpr"),
            "K": "i32",
            "BLOCK_M": "constexpr",
            "BLOCK_N": "constexpr",
            "BLOCK_K": "constexpr",
        },
        constexprs=dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True)),
        num_warps=num_warps,
        num_stages=num_stages,
        divisible_by_16=("a_ptr", "b_ptr", "c_ptr", "a_strides", "K"),
        wants_mma=True,
        flops=1e9,
        bytes=1e6,
        work=Work(1.0, unit="tile"),
    )


def compile_cases(arch: str) -> list[CompileCase]:
    """A good tile, one too large for any block; where it matters, one that spills, one too narrow.

    A spilling kernel takes long to assemble, and only wgmma wants 64 rows.
    """
    cases = [_case("good", (64, 64, 64), 4, 2), _case("oversized", (128, 128, 128), 8, 5)]
    if arch == "sm_90":
        cases += [_case("spilling", (128, 256, 64), 4, 3), _case("narrow", (32, 64, 64), 4, 2)]
    return cases
