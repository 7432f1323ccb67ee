import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt2.errors import UserError
from fastgpt2.ladder import BytePairEncoder, GPT2Tokenizer
from fastgpt2.text.bpe import PATTERN
from tests.ladder.tiny import story


def reference(encoder: BytePairEncoder) -> tiktoken.Encoding:
    """tiktoken on the same merges."""
    return tiktoken.Encoding(
        "trained", pat_str=PATTERN, mergeable_ranks=encoder.ranks, special_tokens={}
    )


ENCODER = BytePairEncoder.train(story(), 380)
TIKTOKEN = reference(ENCODER)


def test_the_first_merges_are_the_ones_found_by_hand() -> None:
    # pairs: " a" 3, "ab" 4, "bb" 3 (one word "abb" twice, " ab" thrice: ab is in 5, bb in 2)
    encoder = BytePairEncoder.train("abb\nabb ab ab ab", 258)
    assert list(encoder.ranks)[256:] == [b"ab", b" ab"]
    assert encoder.encode(" abb") == [257, encoder.ranks[b"b"]]


def test_equally_frequent_pairs_are_taken_in_the_order_of_bytes() -> None:
    assert list(BytePairEncoder.train("zy\nba", 257).ranks)[256:] == [b"ba"]


def test_training_stops_when_every_word_is_one_token() -> None:
    encoder = BytePairEncoder.train("tea tea", 1000)
    assert encoder.vocab_size == len(encoder.ranks) < 262
    assert encoder.encode("tea tea") == [encoder.ranks[b"tea"], encoder.ranks[b" tea"]]


def test_the_text_it_was_trained_on_as_tiktoken() -> None:
    ids = ENCODER.encode(story())
    assert ids == TIKTOKEN.encode(story())
    assert len(ids) < len(story().encode("utf-8")) / 2.5
    assert ENCODER.decode(ids) == story()


@given(st.text(max_size=60))
def test_any_text_as_tiktoken(text: str) -> None:
    ids = ENCODER.encode(text)
    assert ids == TIKTOKEN.encode(text)
    assert ENCODER.decode(ids) == text


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet="ab ", min_size=1, max_size=80), st.integers(256, 300))
def test_merges_that_overlap_as_tiktoken(text: str, vocab_size: int) -> None:
    encoder = BytePairEncoder.train(text, vocab_size)
    assert list(encoder.ranks.values()) == list(range(encoder.vocab_size))
    for other in (text, text[::-1], text.replace("a", "bb")):
        assert encoder.encode(other) == reference(encoder).encode(other)


def test_gpt2s_files_give_the_same_ids_and_an_end_of_text() -> None:
    tokenizer = GPT2Tokenizer(*ENCODER.gpt2_files())
    for text in (story(3), "naïve café 東京 🙂\n\n  x"):
        assert tokenizer.encode(text) == ENCODER.encode(text)
    assert tokenizer.encode("<|endoftext|>", allow_special=True) == [ENCODER.vocab_size]


def test_gpt2s_files_spell_the_merges_as_gpt2_does() -> None:
    encoder = BytePairEncoder.train("the the the", 259)
    merges = encoder.gpt2_files()[1].splitlines()
    assert merges[:2] == ["#version: 0.2", "h e"]
    assert sorted(merges[2:]) == sorted(["t he", "Ġ the"])


def test_the_plain_encoder_with_gpt2s_merges_is_gpt2s(gpt2_tokenizer: GPT2Tokenizer) -> None:
    gpt2 = gpt2_tokenizer
    ids = [i for i in range(gpt2.vocab_size) if i != gpt2.eot]
    encoder = BytePairEncoder({gpt2.decode_bytes([i]): i for i in ids})
    for text in (story(5), "Akwirw ier; someunknownPlace 12345 — naïve 東京 🙂\n\n   x"):
        assert encoder.encode(text) == gpt2.encode(text)


def test_mistakes() -> None:
    with pytest.raises(UserError, match="vocab_size must be at least 256, got 255"):
        BytePairEncoder.train("x", 255)
    with pytest.raises(UserError, match="no id for 255 of the 256 bytes"):
        BytePairEncoder({b"a": 0})
