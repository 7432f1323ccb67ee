from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastgpt2.errors import UserError
from fastgpt2.generate.generator import Generator
from fastgpt2.generate.stream import encode_prompt, stream_text
from fastgpt2.model import GPT
from fastgpt2.text import BytesTokenizer, CharTokenizer
from tests.tiny_gpt import tiny_gpt

PROMPT = [5, 6, 7]


def stream_tokens(model: GPT, prompt: list[int], count: int, **options: Any) -> Iterator[int]:
    """Token ids as they come, past the window as ``GPT.generate`` goes on."""
    stream = Generator(model, batch_size=1, window="crop").submit(prompt, count, **options)
    return (piece for piece in stream if isinstance(piece, int))


def says(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> GPT:
    """A model that says ``ids``, whatever it is asked."""
    model, said = tiny_gpt(vocab_size=257), iter(ids)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.full((1, 257), -50.0)
        logits[0, next(said)] = 50.0
        return logits

    monkeypatch.setattr(model, "head", head)
    return model


# within the block of 16, and beyond it
@pytest.mark.parametrize("count", [5, 25])
@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, None), (1.0, None), (0.7, 4)])
def test_tokens_are_those_of_generate(count: int, temperature: float, top_k: int | None) -> None:
    model = tiny_gpt().eval()
    generator = torch.Generator().manual_seed(3)
    expected = model.generate(torch.tensor([PROMPT]), count, temperature, top_k, generator)
    tokens = stream_tokens(model, PROMPT, count, temperature=temperature, top_k=top_k, seed=3)
    assert PROMPT + list(tokens) == expected[0].tolist()


def test_tokens_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = says(monkeypatch, [1, 2])
    tokens = stream_tokens(model, PROMPT, 100)
    # there is no third one
    assert [next(tokens), next(tokens)] == [1, 2]


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    model = tiny_gpt()
    runs = [list(stream_tokens(model, PROMPT, 20, seed=s)) for s in (1, 1, 2, None, None)]
    assert runs[0] == runs[1]
    assert len({tuple(run) for run in runs}) == 4


def test_the_global_generator_is_left_alone() -> None:
    model = tiny_gpt()
    state = torch.get_rng_state()
    list(stream_tokens(model, PROMPT, 5))
    assert torch.get_rng_state().equal(state)


def test_it_stops_at_the_end_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = says(monkeypatch, [1, 2, 256, 3])
    assert list(stream_tokens(model, PROMPT, 4, stop=256)) == [1, 2]
    model = says(monkeypatch, [*b"ab", 256, *b"c"])
    assert "".join(stream_text(model, BytesTokenizer(), "x", 4)) == "ab"


def test_no_piece_splits_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    model = says(monkeypatch, list("aé🙂b".encode()))
    pieces = list(stream_text(model, BytesTokenizer(), "x", len("aé🙂b".encode())))
    assert pieces == ["a", "é", "🙂", "b"]


def test_bytes_that_are_no_text_are_shown_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [0xFF, ord("a"), *"🙂".encode()[:2]]
    pieces = list(stream_text(says(monkeypatch, ids), BytesTokenizer(), "x", 4))
    # a character that is not finished is shown when nothing more can come
    assert "".join(pieces) == "�a�"


def test_prompts() -> None:
    chars = CharTokenizer("abc")
    assert encode_prompt(chars, "cab") == [2, 0, 1]
    assert encode_prompt(BytesTokenizer(), "") == [256]
    with pytest.raises(UserError, match=r"^prompt: must not be empty, char has no end-of-text"):
        encode_prompt(chars, "")
    with pytest.raises(UserError, match=r"^sample_prompt: tokenizer char: 'x'"):
        encode_prompt(chars, "ax", "sample_prompt")


def test_a_model_in_training_mode_generates_without_dropout() -> None:
    model = tiny_gpt(dropout=0.5).train()
    runs = [list(stream_tokens(model, PROMPT, 8, temperature=0.0)) for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    model = tiny_gpt(vocab_size=257).to(dtype)
    assert len(list(stream_tokens(model, PROMPT, 20, seed=0))) == 20
