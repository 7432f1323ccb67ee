"""Attention's dropout mask as packed bits, computed once for the forward and both backward kernels.

Bit j of word w of a row says whether the probability of key 32 w + j is kept. A program computes
BLOCK_W words of BLOCK_N rows: eight Philox counters per word, each with four words, all used.
Words after the diagonal hold keys that no query sees: they are not written, and never used.

Grid (cdiv(rows, BLOCK_N), cdiv(words, BLOCK_W)). Bytes: B H T^2 / 16 written, 12.6 MB per layer of
GPT-2 at B = 16; about 17 instructions per bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels import tuning
from fastgpt2.kernels.cases import CompileCase, Work, case, configs
from fastgpt2.kernels.dropout_bits import bits_size
from fastgpt2.kernels.jit.launch import launch_kernel
from fastgpt2.kernels.jit.primitives import keep_words

# keys whose bits share a word
WORD = tl.constexpr(32)


@triton.jit
def _dropout_bits_kernel(bits_ptr, dropout, shape, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    rows, T = shape
    words = tl.cdiv(T, WORD)
    first_w = (tl.program_id(1).to(tl.int64) * BLOCK_W).to(tl.int32)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # a program all of whose queries come before its keys has nothing to do
    last_t = tl.max(offs_n % T, 0)
    if first_w * WORD <= last_t:
        GROUPS: tl.constexpr = WORD // 4
        groups = tl.arange(0, BLOCK_W * GROUPS)
        a, b, c, d = keep_words(dropout, offs_n, T, first_w * GROUPS + groups)
        nibble = a.to(tl.int32) | b.to(tl.int32) << 1 | c.to(tl.int32) << 2 | d.to(tl.int32) << 3
        shifted = tl.reshape(nibble << (groups % GROUPS * 4)[None, :], [BLOCK_N, BLOCK_W, GROUPS])
        # no two of them have a bit in common: the sum is their union
        packed = tl.sum(shifted, axis=2)
        offs_w = first_w + tl.arange(0, BLOCK_W)
        ptrs = bits_ptr + offs_n[:, None] * words + offs_w[None, :]
        tl.store(ptrs, packed, mask=(offs_n < rows)[:, None] & (offs_w < words)[None, :])


@triton.jit
def bit_rows(bits_ptr, b_h, queries, T, EVEN: tl.constexpr):
    """Pointers to the words of each query's row, for the head ``b H + h``."""
    words = tl.cdiv(T, WORD)
    if not EVEN:
        # rows after T have no words: read those of the last row
        queries = tl.minimum(queries, T - 1)
    return bits_ptr + b_h * T * words + queries * words


@triton.jit
def load_keep(ptrs, first_k, offs_k, KEYS: tl.constexpr):
    """Where dropout keeps the probabilities of ``KEYS`` keys from ``first_k``, a multiple of them.

    ``ptrs``, to the word of ``first_k`` in each row, and ``offs_k``, the keys from 0 on, broadcast
    to the tile.
    """
    word = tl.load(ptrs)
    if KEYS < 32:
        word >>= first_k & 31
    for i in tl.static_range(1, KEYS // 32):
        word = tl.where(offs_k < i * 32, word, tl.load(ptrs + i))
    # a thread's keys differ in the bits of 25: shifted by the others, it tests for constants
    return (word >> (offs_k & 6) & (1 << (offs_k & 25))) != 0


@triton.jit
def drop(p, keep, dropout):
    """``p`` where it is kept, or 0."""
    # a zero that the compiler does not know: a constant it would select after the rounding to 16
    # bits, packed in pairs, with twice the instructions
    return tl.where(keep, p, dropout[1] * 0.0)


@triton.jit
def words_until_next(first_k, KEYS: tl.constexpr):
    """From the word of ``first_k`` to that of the key ``KEYS`` later."""
    if KEYS < 32:
        return ((first_k & 31) + KEYS) >> 5
    else:
        return KEYS // 32


@triton.jit
def load_keep_of_keys(ptrs, first_k, KEYS: tl.constexpr):
    """The same with keys down and queries across: [KEYS, queries], for ``ptrs`` [1, queries]."""
    WORDS: tl.constexpr = triton.cdiv(KEYS, 32)
    bits = 1 << tl.arange(0, KEYS // WORDS)
    # one load per word, as a row's words are adjacent: pairs of queries would invite the compiler
    # to test many bits as one vector, and to take it apart again
    words = tl.load(tl.trans(ptrs) + tl.arange(0, WORDS)[None, :])
    if KEYS < 32:
        words >>= first_k & 31
    keep = (tl.trans(words)[:, None, :] & bits[None, :, None]) != 0
    return tl.reshape(keep, [KEYS, ptrs.shape[1]])


def launch_bits(seed: Tensor, B: int, H: int, T: int, dropout_p: float) -> Tensor:
    """The words (B, H, T, cdiv(T, 32)) in int32 as one row, plus padding for the last tile."""
    words = triton.cdiv(T, 32)
    bits = torch.empty(bits_size(B, H, T), dtype=torch.int32, device=seed.device)
    if B * H * T > 0:
        config = tuning.pick("dropout_bits", tuning.arch_of(seed.device))
        rows = B * H * T
        grid = (triton.cdiv(rows, config["BLOCK_N"]), triton.cdiv(words, config["BLOCK_W"]))
        launch_kernel(
            _dropout_bits_kernel, grid, bits, (seed, dropout_p), (rows, T), **config.meta()
        )
    return bits


def compile_cases(arch: str) -> list[CompileCase]:
    """At GPT-2's shape, 16 rows of 12 heads and 1024 tokens."""
    B, H, T = 16, 12, 1024
    arguments = {"bits_ptr": "*i32", "dropout": ("*i64", "fp32"), "shape": ("i32", "i32")}
    return [
        case(
            _dropout_bits_kernel,
            "dropout_bits",
            config,
            "",
            arguments,
            bytes=B * H * T * T / 16,
            flops=0.0,
            work=Work(
                B * H * T * T / 2,
                config["BLOCK_N"] * config["BLOCK_W"] * 32,
                B * H * T * T // (config["BLOCK_N"] * config["BLOCK_W"] * 32),
            ),
        )
        for _, config in configs("dropout_bits", arch)
    ]
