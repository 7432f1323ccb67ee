"""The flags of ``fastgpt2 generate``: each changes the text as it says, or is one clear line."""

from pathlib import Path

import pytest

from fastgpt2.convert import main as convert
from fastgpt2.generate.__main__ import main as generate
from tests.commands.tiny_command import complaint


def text(run: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    common = ["--model", str(run), "--prompt", "the ", "--max-new-tokens", "40", "--seed", "3"]
    assert generate([*common, *flags]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_the_best_token_alone_is_greedy(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = text(finished, capsys, "--greedy")
    for flags in (["--top-p", "0"], ["--min-p", "1"], ["--top-k", "1"]):
        assert text(finished, capsys, *flags) == greedy
    # proposals are checked: the text is the same
    assert text(finished, capsys, "--greedy", "--prompt-lookup", "4") == greedy
    assert text(finished, capsys, "--greedy", "--draft", str(finished)) == greedy


def test_penalties_change_the_text(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = text(finished, capsys, "--greedy")
    for flags in (
        ["--repetition-penalty", "9"],
        ["--presence-penalty", "50"],
        ["--frequency-penalty", "50"],
    ):
        assert text(finished, capsys, "--greedy", *flags) != greedy
    # ids, not characters, do not repeat
    assert text(finished, capsys, "--greedy", "--no-repeat-ngram", "1") != greedy


def test_a_stop_ends_before_itself(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = text(finished, capsys, "--greedy").removeprefix("the ").removesuffix("\n")
    stop = whole[len(whole) // 2]
    found = text(finished, capsys, "--greedy", "--stop", stop)
    assert found == "the " + whole[: whole.index(stop)] + "\n"


def test_int8_weights_write(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert text(finished, capsys, "--quantize", "int8", "--greedy").startswith("the ")


def test_the_window_may_end_the_text(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped = text(finished, capsys, "--greedy", "--window", "stop", "--max-new-tokens", "200")
    slid = text(finished, capsys, "--greedy", "--window", "slide", "--max-new-tokens", "200")
    assert len(stopped) < len(slid) and slid.startswith(stopped.removesuffix("\n"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-p", "1.5"], "top_p"),
        (["--min-p", "nan"], "min_p"),
        (["--typical", "0"], "typical"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
        (["--no-repeat-ngram", "0"], "no_repeat_ngram"),
        (["--prompt-lookup", "-1"], "prompt-lookup"),
        (["--draft", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(
    finished: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert message in complaint(generate, ["--model", str(finished), *flags], capsys)


def test_run_takes_every_format(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that brings no tokenizer says which flags give one."""
    expected = text(finished, capsys, "--greedy", "--dtype=fp32")
    for format in ("hf", "nanogpt"):
        assert convert([str(finished), str(tmp_path / format), "--to", format]) == 0
        argv = ["--run", str(tmp_path / format), "--prompt", "the ", "--max-new-tokens", "40"]
        said = complaint(generate, argv, capsys)
        assert (
            said == f"{tmp_path / format}: no tokenizer beside it; give --tokenizer or --vocab-dir"
        )
        assert generate([*argv, "--greedy", "--tokenizer", "bytes"]) == 0
        assert capsys.readouterr().out[:8] == expected[:8]


def test_a_tokenizer_that_is_asked_for_takes_the_models_place(
    finished: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = text(finished, capsys, "--greedy")
    (run / "fastgpt2_tokenizer.json").write_text("{}", encoding="utf-8")
    assert "damaged tokenizer" in complaint(generate, ["--model", str(run)], capsys)
    assert text(run, capsys, "--greedy", "--tokenizer", "bytes") == expected


@pytest.mark.parametrize("flag", ["--impl=reference", "--dtype=fp16"])
def test_nothing_is_said_of_a_compiler_that_was_not_asked_for(
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
) -> None:
    monkeypatch.setattr("fastgpt2.generate.__main__.pays", lambda *_: True)
    argv = ["--model", str(finished), "--prompt=a", "--max-new-tokens=2", flag]
    for more, expected in (([], False), (["--compile"], True)):
        assert generate([*argv, *more]) == 0
        assert ("compile: for plain models" in capsys.readouterr().err) == expected
