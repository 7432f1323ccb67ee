"""A small share of the fuzz, and that it would see what goes wrong."""

from typing import Any

import pytest

from fastgpt2.generate import Generator
from tools.fuzz_generate import fuzz, main


def test_a_text_or_one_clear_error() -> None:
    said: list[str] = []
    ends = fuzz(20_000, 120, said.append)
    assert not said, "\n".join(said)
    # neither side alone would show anything
    assert ends["text"] > 20 and ends["error"] > 20


def test_a_traceback_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def submit(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Generator, "submit", submit)
    assert main(["--first=0", "--count=12"]) == 1
    said = capsys.readouterr().out
    assert "request 0: " in said and "ZeroDivisionError" in said and " failure" in said
