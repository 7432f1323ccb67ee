"""Ids to text in pieces: whole characters, and nothing of a stop string."""

import pytest

from fastgpt2.errors import UserError
from fastgpt2.generate import Generator
from fastgpt2.generate.text import TextPieces
from fastgpt2.text import BytesTokenizer
from tests.tiny_gpt import tiny_gpt


def pieces(data: bytes, *stop: str) -> tuple[list[str], bool]:
    text = TextPieces(BytesTokenizer(), stop)
    shown = []
    for id_ in data:
        shown.append(text.push(id_))
        if text.stopped:
            break
    shown.append(text.finish())
    return [piece for piece in shown if piece], text.stopped


@pytest.mark.parametrize(
    ("data", "stop", "expected", "stopped"),
    [
        ("aé🙂".encode(), (), ["a", "é", "🙂"], False),
        (b"one. two", (".",), list("one"), True),
        # held back while it may still become the stop string, then shown
        (b"abcabd", ("abd",), ["abc"], True),
        (b"xababy", ("abac",), ["x", "ab", "aby"], False),
        (b"end ab", ("abc",), [*"end ", "ab"], False),
        # the one that begins first counts, and several may be the same
        (b"abcd", ("bc", "abc", "bc"), [], True),
        ("né".encode(), ("é",), ["n"], True),
        # half a character at the end
        ("a🙂".encode()[:3], (), ["a", "\ufffd"], False),
        ("a🙂".encode()[:3], ("\ufffd",), ["a"], True),
    ],
)
def test_pieces(data: bytes, stop: tuple[str, ...], expected: list[str], stopped: bool) -> None:
    shown, ended = pieces(data, *stop)
    assert ("".join(shown), ended) == ("".join(expected), stopped)
    assert shown == expected


def test_rows_stream_at_the_same_time() -> None:
    """No piece of any row splits a character, and all of them together are the text."""
    model = tiny_gpt(vocab_size=257)
    generator = Generator(model, BytesTokenizer(), batch_size=3)
    streams = [generator.submit("é🙂"[:n], 60, seed=n) for n in (0, 1, 2)]
    shown: list[list[str | int]] = [[], [], []]
    while generator.step():
        for row, stream in zip(shown, streams, strict=True):
            row += stream.poll()
    for row, stream in zip(shown, streams, strict=True):
        whole = bytes(stream.ids).decode("utf-8", errors="replace")
        assert "".join(map(str, row)) == stream.text == whole


def test_stop_strings_of_a_request() -> None:
    model, tokenizer = tiny_gpt(vocab_size=257), BytesTokenizer()
    whole = Generator(model, tokenizer).submit("stop", 40, seed=2).wait()
    stop = whole.text[9:11]
    stream = Generator(model, tokenizer).submit("stop", 40, seed=2, stop=[stop, stop]).wait()
    assert stream.finish_reason == "stop"
    assert stream.text == whole.text[: whole.text.index(stop)]
    assert stream.ids == whole.ids[: len(stream.ids)]
    # in the prompt it stops nothing
    again = Generator(model, tokenizer).submit("stop", 9, seed=2, stop="stop").wait()
    assert again.ids == whole.ids[:9]
    with pytest.raises(UserError, match="a stop string must not be empty"):
        Generator(model, tokenizer).submit("x", stop="")


def test_ids_that_only_pad_the_vocabulary_are_never_drawn() -> None:
    generator = Generator(tiny_gpt(vocab_size=300), BytesTokenizer())
    stream = generator.submit("x", 200, temperature=20.0, seed=0).wait()
    assert max(stream.ids) < 256
