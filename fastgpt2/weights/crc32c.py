"""CRC-32C (Castagnoli) in numpy, fast enough for checkpoints of gigabytes.

The register of a CRC is linear over GF(2). Four zero bytes multiply it by a 32 x 32 bit matrix A;
the little-endian words w_0 ... w_{M-1} turn it into

    A^M(init) ^ A^M(w_0) ^ A^{M-1}(w_1) ^ ... ^ A(w_{M-1}).

Horner's rule with A^K instead of A runs K interleaved registers at once, one numpy row of K words
per step; A^K is two lookups in tables of 65536 words. At the end the K registers are folded in
pairs.
Matrices are stored as their 32 columns (uint32).

Polynomial and check value: RFC 3720, appendix B.4; the mask: LevelDB's and TensorFlow's record
formats.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

# reflected form of 0x1EDC6F41
POLYNOMIAL = 0x82F63B78
# K, the most registers that run at once: rows of 32 KiB stay in the first-level cache
LANES = 8192
MASK_DELTA = 0xA282EAD8


def _apply(matrix: Words, x: Words) -> Words:
    """``matrix`` times each word of ``x``, over GF(2)."""
    result = np.zeros_like(x)
    for bit in range(32):
        result ^= matrix[bit] * (x >> np.uint32(bit) & np.uint32(1))
    return result


@cache
def _zero_bytes(log2: int) -> Words:
    """The matrix that ``2**log2`` zero bytes multiply the register by."""
    if log2:
        half = _zero_bytes(log2 - 1)
        return _apply(half, half)
    columns = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for _ in range(8):
        columns = (columns >> np.uint32(1)) ^ np.uint32(POLYNOMIAL) * (columns & np.uint32(1))
    return columns


@cache
def _row_tables(row_bytes: int) -> tuple[Words, Words]:
    """A^K as two lookup tables, for the low and the high half of a word."""
    matrix = _zero_bytes(row_bytes.bit_length() - 1)
    tables = np.zeros((2, 1 << 16), np.uint32)
    for table, columns in zip(tables, (matrix[:16], matrix[16:]), strict=True):
        for bit, column in enumerate(columns):
            table[1 << bit : 2 << bit] = table[: 1 << bit] ^ column
    return tables[0], tables[1]


def crc32c(data: bytes | NDArray[np.uint8]) -> int:
    """CRC-32C of ``data``, bytes or a one-dimensional uint8 array (a memory map too)."""
    data = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    # short rows for short data: folding many registers would cost more than they save
    row_bytes = 4 * min(LANES, 1 << (len(data) // 256).bit_length())
    # zero bytes in front do not change a zero register, so they pad the first row
    head = len(data) % row_bytes
    first = np.zeros(row_bytes, np.uint8)
    first[row_bytes - head :] = data[:head]
    lanes = first.view("<u4").astype(np.uint32)
    low, high = _row_tables(row_bytes)
    for start in range(head, len(data), row_bytes):
        row = data[start : start + row_bytes].view("<u4")
        lanes = low[lanes & np.uint32(0xFFFF)] ^ high[lanes >> np.uint32(16)] ^ row
    log2 = 2
    while len(lanes) > 1:
        lanes = _apply(_zero_bytes(log2), lanes[0::2]) ^ lanes[1::2]
        log2 += 1
    register = _apply(_zero_bytes(2), lanes)
    # the register starts with all ones: add their contribution, by linearity
    ones = np.array([0xFFFFFFFF], np.uint32)
    for bit in range(len(data).bit_length()):
        if len(data) >> bit & 1:
            ones = _apply(_zero_bytes(bit), ones)
    return int(register[0] ^ ones[0]) ^ 0xFFFFFFFF


def mask(crc: int) -> int:
    """The stored form of a CRC: rotated and offset, so that a CRC over stored CRCs works."""
    rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
    return (rotated + MASK_DELTA) & 0xFFFFFFFF
