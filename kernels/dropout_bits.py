"""How large attention's packed dropout mask is."""

# words that the last row's tile may read beyond its own: a tile has up to 128 keys
_PADDING = 4


def bits_size(B: int, H: int, T: int) -> int:
    """32-bit words of the mask of (B, H, T, T): rows of cdiv(T, 32), and padding at the end."""
    return B * H * T * -(-T // 32) + _PADDING
