"""LevelDB's sorted string table, the container of a TensorFlow checkpoint's index.

    data block ... | metaindex block | index block | footer (48 bytes)

A block is a sequence of entries whose keys share prefixes, then the positions of its restart points
(entries with a whole key). A compression byte and a masked CRC-32C follow it. The index block's
values are the places of the data blocks; the footer has the place of the index block.
Format: https://github.com/google/leveldb/blob/main/doc/table_format.md
"""

import struct
from collections.abc import Iterator, Mapping

from fastgpt2.weights.crc32c import crc32c, mask
from fastgpt2.weights.protobuf import read_varint, write_varint

MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48
TRAILER_BYTES = 5
RESTART_INTERVAL = 16
UNCOMPRESSED, SNAPPY = 0, 1

# far above any GPT-2 (a name is under 100 bytes; gpt2-xl with two optimizer slots has 1,742 names):
# prefix compression must not unfold a small file into gigabytes
MAX_KEY_BYTES = 1024
MAX_ENTRIES = 100_000


def _read_handle(data: bytes, at: int) -> tuple[int, int, int]:
    offset, at = read_varint(data, at)
    size, at = read_varint(data, at)
    return offset, size, at


def _read_block(table: bytes, offset: int, size: int) -> bytes:
    """The entries of the block at ``offset``, with its CRC checked and restart points removed."""
    if offset + size + TRAILER_BYTES > len(table) - FOOTER_BYTES:
        raise ValueError(f"a block of {size} bytes at {offset} lies outside the file")
    block = table[offset : offset + size]
    compression, crc = struct.unpack_from("<BI", table, offset + size)
    if mask(crc32c(table[offset : offset + size + 1])) != crc:
        raise ValueError(f"the block at {offset} has a wrong CRC-32C")
    if compression != UNCOMPRESSED:
        kind = "snappy" if compression == SNAPPY else f"unknown ({compression})"
        raise ValueError(f"the block at {offset} has {kind} compression, which is not supported")
    if size < 4:
        raise ValueError(f"the block at {offset} is cut off")
    restarts = int.from_bytes(block[-4:], "little")
    if 4 * (restarts + 1) > size:
        raise ValueError(f"the block at {offset} has {restarts} restart points, too many")
    return block[: size - 4 * (restarts + 1)]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    at, key = 0, b""
    while at < len(block):
        shared, at = read_varint(block, at)
        rest, at = read_varint(block, at)
        size, at = read_varint(block, at)
        if shared > len(key) or rest + size > len(block) - at:
            raise ValueError("a block's entry is cut off")
        if shared + rest > MAX_KEY_BYTES:
            raise ValueError(f"a key is longer than {MAX_KEY_BYTES} bytes")
        key = key[:shared] + block[at : at + rest]
        at += rest
        yield key, block[at : at + size]
        at += size


def read_table(table: bytes) -> dict[bytes, bytes]:
    """Keys and values of a sorted string table, in the order of the keys.

    Raises:
        ValueError: the table is cut off, corrupt or compressed.
    """
    if len(table) < FOOTER_BYTES:
        raise ValueError(f"{len(table)} bytes are too few for a TensorFlow checkpoint's index")
    footer = table[-FOOTER_BYTES:]
    if int.from_bytes(footer[40:], "little") != MAGIC:
        raise ValueError("not a TensorFlow checkpoint's index (wrong magic number at its end)")
    *_, at = _read_handle(footer[:40], 0)
    offset, size, _ = _read_handle(footer[:40], at)
    contents: dict[bytes, bytes] = {}
    last = None
    for _, handle in _entries(_read_block(table, offset, size)):
        block_offset, block_size, _ = _read_handle(handle, 0)
        for key, value in _entries(_read_block(table, block_offset, block_size)):
            if last is not None and key <= last:
                raise ValueError(f"the key {key!r} is out of order")
            if len(contents) == MAX_ENTRIES:
                raise ValueError(f"more than {MAX_ENTRIES} entries")
            contents[key] = value
            last = key
    return contents


def _block(entries: Mapping[bytes, bytes]) -> bytes:
    """A block with its restart points, compression byte and CRC."""
    out, restarts, last = bytearray(), [0], b""
    for count, (key, value) in enumerate(entries.items()):
        shared = 0
        if count and count % RESTART_INTERVAL == 0:
            restarts.append(len(out))
        elif count:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += write_varint(shared) + write_varint(len(key) - shared) + write_varint(len(value))
        out += key[shared:] + value
        last = key
    out += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
    out.append(UNCOMPRESSED)
    return bytes(out) + struct.pack("<I", mask(crc32c(bytes(out))))


def write_table(contents: Mapping[bytes, bytes]) -> bytes:
    """A sorted string table of one data block; the keys must come in order."""
    data, meta = _block(contents), _block({})

    def handle(offset: int, block: bytes) -> bytes:
        return write_varint(offset) + write_varint(len(block) - TRAILER_BYTES)

    # a short key that no key of the block exceeds, as LevelDB writes it
    first = max(contents)[:1]
    bound = bytes([first[0] + 1])
    index = _block({bound: handle(0, data)})
    footer = handle(len(data), meta) + handle(len(data) + len(meta), index)
    return data + meta + index + footer.ljust(40, b"\0") + MAGIC.to_bytes(8, "little")
