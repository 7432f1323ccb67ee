import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt2.errors import UserError
from fastgpt2.ladder import SimpleTokenizerV1, SimpleTokenizerV2, build_vocab, split_words
from tests.ladder import published

TEXT = "Tea, or coffee? The tea--said she--is cold; it's the painter's."
SPECIAL = ("<|endoftext|>", "<|unk|>")


def test_words_and_marks() -> None:
    assert split_words("Hello, world. Is this-- a (test)?") == [
        "Hello", ",", "world", ".", "Is", "this", "--", "a", "(", "test", ")", "?",
    ]  # fmt: skip
    assert split_words("a-b a---b it's") == ["a-b", "a", "--", "-b", "it", "'", "s"]
    assert split_words(" \n\t") == []


@given(st.text(alphabet="ab-—,.'\"(_ \n", max_size=40))
def test_nothing_but_white_space_is_lost(text: str) -> None:
    words = split_words(text)
    assert "".join(words) == "".join(text.split())
    assert all(words)


def test_the_vocabulary_is_sorted_and_the_special_tokens_come_last() -> None:
    vocab = build_vocab(TEXT, SPECIAL)
    assert list(vocab.values()) == list(range(len(vocab)))
    words = list(vocab)
    assert words[:-2] == sorted(set(split_words(TEXT)))
    assert words[-2:] == list(SPECIAL)


def test_v1_goes_there_and_back() -> None:
    tokenizer = SimpleTokenizerV1(build_vocab(TEXT))
    ids = tokenizer.encode("The tea, or coffee?")
    assert tokenizer.decode(ids) == "The tea, or coffee?"
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_v1_names_the_word_it_does_not_know() -> None:
    with pytest.raises(UserError, match=r"SimpleTokenizerV1: 'Hello' is not in the vocabulary"):
        SimpleTokenizerV1(build_vocab(TEXT)).encode("Hello, tea")


def test_v2_equals_v1_on_known_words() -> None:
    vocab = build_vocab(TEXT, SPECIAL)
    assert SimpleTokenizerV2(vocab).encode(TEXT) == SimpleTokenizerV1(vocab).encode(TEXT)


def test_v2_takes_any_text() -> None:
    vocab = build_vocab(TEXT, SPECIAL)
    tokenizer = SimpleTokenizerV2(vocab)
    ids = tokenizer.encode("Hello, tea <|endoftext|> or palace")
    assert tokenizer.decode(ids) == "<|unk|>, tea <|endoftext|> or <|unk|>"
    assert vocab["<|endoftext|>"] in ids


def test_v2_needs_a_token_for_the_unknown() -> None:
    with pytest.raises(UserError, match=r"the vocabulary has no <\|unk\|>"):
        SimpleTokenizerV2(build_vocab(TEXT))


def test_the_published_numbers_of_the_verdict(verdict: str) -> None:
    vocab = build_vocab(verdict)
    assert len(split_words(verdict)) == published.VERDICT_WORDS
    assert len(vocab) == published.VERDICT_VOCABULARY
    tokenizer = SimpleTokenizerV1(vocab)
    assert tokenizer.encode(published.QUOTATION) == published.QUOTATION_IDS
