"""A text that goes on where another ended: its cache, its window, and ``--interactive``."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastgpt2.errors import Stopped, UserError
from fastgpt2.generate import Generator
from fastgpt2.generate.slots import Slots
from fastgpt2.text import BytesTokenizer
from tests.commands.tiny_generate import generate, save_tiny
from tests.faults import signal_at
from tests.tiny_gpt import tiny_gpt

TURNS = [[1, 2, 3], [7], [], [20, 21]]


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass has read."""
    counts: list[int] = []
    plain = Slots.feed

    def feed(slots: Slots, first: int, tokens: Sequence[Sequence[int]], **options: Any) -> Any:
        counts.append(sum(map(len, tokens)))
        return plain(slots, first, tokens, **options)

    monkeypatch.setattr(Slots, "feed", feed)
    return counts


@pytest.mark.parametrize("lookup", [0, 2])
def test_the_cache_goes_on(fed: list[int], lookup: int) -> None:
    model = tiny_gpt(block_size=64)
    generator = Generator(model, batch_size=1, prompt_lookup=lookup)
    last, text = None, list[int]()
    for turn in TURNS:
        fed.clear()
        last = generator.submit(turn, 5, temperature=0.0, follows=last).wait()
        # the tokens of the turn, and the last one before it, which no pass has read yet; where
        # there is one alone, proposals may come with it
        assert fed[0] == len(turn) + bool(text) or (lookup and not turn)
        text += turn
        alone = Generator(model).submit(text, 5, temperature=0.0).wait()
        assert last.ids == alone.ids and list(last.request.prompt) == text
        text += last.ids


def test_the_window_is_the_same_with_and_without_the_cache(fed: list[int]) -> None:
    """Another request takes the row: the text is the one it would have been."""
    found = []
    for disturbed in (False, True):
        generator = Generator(tiny_gpt(), batch_size=1)
        last, ids = None, []
        for turn in TURNS * 2:
            if disturbed:
                generator.submit([9], 3).wait()
            last = generator.submit(turn, 5, temperature=0.0, follows=last).wait()
            ids.append(last.ids)
        assert last is not None and last.start > 0
        found.append(ids)
        passes = len(fed)
    assert found[0] == found[1]
    assert passes < len(fed) * 2


def test_a_stop_id_is_not_part_of_what_goes_on() -> None:
    model = tiny_gpt()
    first = Generator(model).submit([1, 2], 6, temperature=0.0).wait()
    generator = Generator(model, batch_size=1)
    stop = first.ids[2]
    stopped = generator.submit([1, 2], 6, temperature=0.0, stop=stop).wait()
    again = generator.submit([], 2, temperature=0.0, follows=stopped).wait()
    assert [*stopped.ids, *again.ids] == first.ids[: len(stopped.ids) + 2]


def test_what_cannot_be_followed() -> None:
    generator = Generator(tiny_gpt(vocab_size=257), BytesTokenizer(), window="stop")
    running = generator.submit([1], 3)
    with pytest.raises(UserError, match="follows: the stream has not ended"):
        generator.submit([2], 3, follows=running)
    last = generator.submit([1] * 10, 5).wait()
    with pytest.raises(UserError, match="17 tokens, but the model's window holds 16"):
        generator.submit("xx", 3, follows=last)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


def test_lines_that_are_typed(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--interactive", "--greedy", "--prompt=the "]
    generate(tiny, *flags, typed=b"cat\n\ncaf\xff")
    said = capsys.readouterr()
    model = tiny_gpt(vocab_size=257, n_layer=1, n_head=1, n_embd=8)
    generator, last, shown = Generator(model, BytesTokenizer(), batch_size=1), None, []
    for typed in ("the cat", "", "\ncaf\ufffd"):
        last = generator.submit(typed, 9, temperature=0.0, follows=last).wait()
        shown.append(f"> {last.text}\n")
    assert said.out == "".join(shown) + "> \n"
    assert "Ctrl-D ends" in said.err and "27 tokens in " in said.err


def test_ctrl_c_ends_a_text_and_then_the_conversation(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    point = "fastgpt2.generate.generator.Generator.step"
    with signal_at(point, 3, signal.SIGINT) as fault:
        generate(tiny, "--interactive", "--greedy", typed=b"cat\ndog\n")
    assert fault.happened
    cut, whole, end = capsys.readouterr().out.split("\n")[:-1]
    assert len(cut) < len(whole) and end == "> "

    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    generate(tiny, "--interactive")

    def stopped(prompt: str) -> str:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr("builtins.input", stopped)
    generate(tiny, "--interactive", code=128 + signal.SIGTERM)
    with signal_at(point, 3, signal.SIGTERM):
        monkeypatch.setattr("builtins.input", lambda prompt: "cat")
        generate(tiny, "--interactive", code=128 + signal.SIGTERM)
    assert "Traceback" not in capsys.readouterr().err
