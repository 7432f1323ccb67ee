"""Varints and the protocol-buffer wire format, with every bound checked.

Encoding: https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The unsigned varint at ``data[at:]`` (at most 64 bits) and the position after it."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise ValueError("a number is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 1 << 64:
                break
            return value, at
    raise ValueError("a number is longer than 64 bits")


def write_varint(value: int) -> bytes:
    """``value`` (not negative) as a varint."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol-buffer message as (number, integer or bytes), in file order."""
    at = 0
    while at < len(message):
        tag, at = read_varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = read_varint(message, at)
            yield number, value
            continue
        if wire == BYTES:
            size, at = read_varint(message, at)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"a message has a field of unknown wire type {wire}")
        if size > len(message) - at:
            raise ValueError("a message is cut off")
        body = message[at : at + size]
        at += size
        yield number, body if wire == BYTES else int.from_bytes(body, "little")


def write_field(number: int, value: int | bytes, *, fixed32: bool = False) -> bytes:
    """One field: bytes with their length, an integer as varint or, with ``fixed32``, four bytes."""
    if isinstance(value, bytes):
        return write_varint(number << 3 | BYTES) + write_varint(len(value)) + value
    if fixed32:
        return write_varint(number << 3 | FIXED32) + value.to_bytes(4, "little")
    return write_varint(number << 3 | VARINT) + write_varint(value)
