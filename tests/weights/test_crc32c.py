import numpy as np
import pytest

from fastgpt2.weights.crc32c import LANES, POLYNOMIAL, crc32c, mask


def shifted(register: int) -> int:
    for _ in range(8):
        register = register >> 1 ^ POLYNOMIAL * (register & 1)
    return register


TABLE = [shifted(byte) for byte in range(256)]


def bytewise(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register = TABLE[(register ^ byte) & 0xFF] ^ register >> 8
    return register ^ 0xFFFFFFFF


# RFC 3720, appendix B.4, and the catalogue's check value
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_published_values(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


@pytest.mark.parametrize("size", [1, 3, 4, 5, 255, 256, 257, 4095, 4096, 70_001, 256 * LANES + 5])
def test_equals_the_definition(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    assert crc32c(data) == bytewise(data.tobytes())


def test_data_that_is_not_aligned() -> None:
    data = np.random.default_rng(0).integers(0, 256, 9999, dtype=np.uint8)
    assert crc32c(data[3:]) == bytewise(data[3:].tobytes())


def test_mask() -> None:
    # rotated right by 15, plus the constant, in 32 bits
    assert mask(0) == 0xA282EAD8
    assert mask(0xFFFFFFFF) == 0xA282EAD7
    assert mask(1) == (1 << 17) + 0xA282EAD8
