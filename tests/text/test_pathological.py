"""A long run of one character is one long word to GPT-2's pattern: it must not take forever."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt2.text import GPT2Tokenizer
from tests.text.tiny import tiny_files

TOKENIZER = GPT2Tokenizer(*tiny_files())
MEGABYTE = 1 << 20


@pytest.mark.parametrize(
    "unit", ["^", "a", "th", "7", "ACGT", "🙂", " ", "\n", "\t", "é", "\u200b"]
)
def test_a_megabyte_of_one_thing_comes_back(unit: str) -> None:
    text = unit * (MEGABYTE // len(unit.encode("utf-8")))
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    # what is merged in a short run is merged in a long one
    few = TOKENIZER.encode(unit * 64)
    assert len(ids) <= len(few) * (len(text) // (64 * len(unit)) + 1)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1, max_size=3), st.integers(1, 5000)), max_size=4))
def test_runs_of_anything_come_back(runs: list[tuple[str, int]]) -> None:
    text = "".join(unit * count for unit, count in runs)
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
