"""The windows are those of transformers' recipe."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt2.errors import UserError
from fastgpt2.evaluate.windows import Window, Windows, make_batch


def recipe(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first token that counts, end) of each step of the recipe's loop."""
    windows, before = [], 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        # labels are moved by one: the first token of a window is never one
        windows.append((begin, max(before, begin + 1), end))
        before = end
        if end == length:
            break
    return windows


@given(st.integers(2, 80), st.integers(2, 20), st.data())
def test_equal_the_recipe_and_score_every_token_once(
    length: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    windows = Windows(length, context, stride, block_size=context)
    got = [windows[k] for k in range(len(windows))]
    assert got == [w for w in recipe(length, context, stride) if w[1] < w[2]]
    scored = [token for _, first, end in got for token in range(first, end)]
    unscored = range(0, length, stride) if stride == context else [0]
    assert scored == [token for token in range(length) if token not in unscored]


@pytest.mark.parametrize(
    ("context", "stride", "message"),
    [
        (10, 1, r"--context must be in \[2, 9\]"),
        (1, 1, r"--context must be in \[2, 9\]"),
        (9, 10, r"--stride must be in \[1, 9\], the context, got 10"),
        (9, 0, "--stride must be"),
    ],
)
def test_out_of_range(context: int, stride: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Windows(100, context, stride, block_size=8)


def test_too_short() -> None:
    with pytest.raises(UserError, match="data: 1 tokens, at least 2 are needed"):
        Windows(1, 4, 2, block_size=8)


def test_batch() -> None:
    tokens = np.arange(10, 20, dtype=np.uint16)
    idx, targets = make_batch(tokens, [Window(0, 1, 4), Window(2, 4, 6), Window(8, 9, 10)])
    assert idx.tolist() == [[10, 11, 12], [12, 13, 14], [18, 0, 0]]
    assert targets.tolist() == [[11, 12, 13], [-100, 14, 15], [19, -100, -100]]
