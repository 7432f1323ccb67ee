"""Mistakes in what ``generate`` is asked for: one line that names the place, and nothing done."""

from pathlib import Path

import pytest

from fastgpt2.generate.__main__ import main
from tests.commands.tiny_command import complaint


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--greedy --temperature=1", "--greedy and --temperature exclude each other"),
        ("--greedy --best-of=2", "best_of: greedy decoding writes the same text"),
        ("--temperature=0 --best-of=2", "best_of: greedy decoding writes the same text"),
        ("--num-beams=2 --temperature=0.5", "beams draw nothing, so they take no temperature"),
        ("--num-beams=2 --top-p=0.5", "beams draw nothing, so they take no top_p"),
        ("--num-beams=2 --best-of=2", "beams draw nothing, so they take no best_of"),
        ("--num-beams=2 --samples=3", "2 beams end as 2 texts, got 3"),
        ("--num-beams=2 --prompt-lookup=2", "--num-beams and --prompt-lookup exclude"),
        ("--draft=x --prompt-lookup=2", "--draft and --prompt-lookup exclude each other"),
        ("--prompt-lookup=-1", "--prompt-lookup must be a number from 0"),
        ("--dtype=fp16 --top-p=2", "top_p must be in [0, 1], got 2.0"),
        ("--length-penalty=2", "are for beams; give num_beams"),
        ("--num-beams=2 --length-penalty=nan", "length_penalty must be in [-30, 30], got nan"),
        ("--early-stopping", "are for beams; give num_beams"),
        ("--min-new-tokens=9 --max-new-tokens=8", "min_new_tokens (9) is more than"),
        ("--batch-size=0", "--batch-size must be a number from 1"),
        ("--best-of=-1", "--best-of must be a number from 1"),
        ("--input=x --prompt=y", "--input and --prompt exclude each other"),
        ("--interactive --output=x", "--interactive and --output exclude each other"),
        ("--interactive --samples=2", "--interactive and --samples exclude each other"),
        ("--score", "--score: give the text by --prompt or --input"),
        ("--score --prompt=x --top-k=3", "--score and --top-k exclude each other"),
        ("--score --prompt=x --stop=y", "--score and --stop exclude each other"),
        ("--score --interactive", "--score and --interactive exclude each other"),
        ("--overwrite", "--overwrite is for --output FILE"),
        ("--resume --output=-", "--resume is for --output FILE"),
        ("--overwrite --resume --output=x", "--overwrite and --resume exclude each other"),
        ("--input=nowhere", "nowhere: No such file"),
        ("--stop=", "stop: a stop string must not be empty"),
        ("--window=stop --prompt=12345678901234567", "17 tokens, but the model's window holds 16"),
        ("--output=/nowhere/x", "/nowhere/x: No such file or directory"),
        ("--repetition-penalty=1e-40", "repetition_penalty must be a positive number"),
        ("--presence-penalty=1e39", "presence_penalty must be a finite number"),
    ],
)
def test_flags(tiny: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    assert message in complaint(main, ["--model", str(tiny), *flags.split()], capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "--input FILE: holds no prompt"),
        (b"\n \n", "--input FILE: holds no prompt"),
        (b"caf\xe9", "--input: FILE is not UTF-8: byte 0xe9 at offset 3"),
        (b"a\0b", "--input: FILE is not text: NUL byte at offset 1"),
        (b"\xff\xfea\0", "FILE is not UTF-8"),
        (b'{"prompt": "a"', "line 1: not JSON"),
        (b'{"prompt": "a"}\n\nnot', "line 3: not JSON"),
        (b'{"prompt": "a"}\n["b"]', "line 2: expected an object with either 'prompt' or 'ids'"),
        (b'{"text": "a"}', "line 1: expected an object with either 'prompt' or 'ids'"),
        (b'{"prompt": "a", "ids": [1]}', "line 1: expected an object with either"),
        (b'{"prompt": 3}', "line 1: 'prompt' must be a string, got 3"),
        (b'{"ids": [1.5]}', "line 1: 'ids' must be a list of integers, got [1.5]"),
        (b'{"ids": [true]}', "line 1: 'ids' must be a list of integers, got [True]"),
        (b'{"ids": []}', "line 1: prompt: must hold at least one token"),
        (b'{"ids": [257]}', "line 1: prompt: id 257 is not in [0, 257)"),
        (b'{"ids": [-1]}', "line 1: prompt: id -1 is not in [0, 257)"),
        (b'{"prompt": "a", "id": [1]}', "line 1: 'id' must be a string or an integer"),
        (b'{"prompt": "a", "temprature": 1}', "unknown key 'temprature'; did you mean 'temper"),
        (b'{"prompt": "a", "temperature": NaN}', "line 1: not JSON (NaN is not a number of JSON)"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature must be 0 or more, got inf"),
        (b'{"prompt": "a", "temperature": "hot"}', "temperature must be 0 or more, got 'hot'"),
        (b'{"prompt": "a", "temperature": true}', "temperature must be 0 or more, got True"),
        (b'{"prompt": "a", "prompt": "b"}', "line 1: 'prompt' is given twice"),
        (b'{"prompt": "a", "top_k": 2.5}', "top_k must be an integer of 1 or more, got 2.5"),
        (b'{"prompt": "a", "seed": -1}', "seed must be an integer in [0, 2^62), got -1"),
        (b'{"prompt": "a", "stop": [""]}', "line 1: stop: a stop string must not be empty"),
        (b'{"prompt": "a", "stop": [null]}', "stop: expected strings and token ids, got None"),
        (b'{"prompt": "a", "stop": 257}', "line 1: stop: id 257 is not in [0, 257)"),
        (b'{"prompt": "a", "logit_bias": [1]}', "logit_bias must map token ids to numbers"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias must map token ids to numbers"),
        (b'{"prompt": "a", "logit_bias": {"257": 1}}', "an id must be in [0, 257), got 257"),
        (b'{"prompt": "a", "logit_bias": {"1": "x"}}', "the bias of 1 must be a finite number"),
        (b'{"prompt": "a", "early_stopping": 1}', "early_stopping must be true or false, got 1"),
        (b"[" * 100_000 + b"1", None),
        (b'{"prompt": ' + b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_lines(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    message: str | None,
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_bytes(content)
    argv = ["--model", str(tiny), "--input", str(source), "--output", str(out)]
    if message is None:
        # a line like any other
        assert main([*argv, "--max-new-tokens=1"]) == 0
        return
    assert message.replace("FILE", str(source)) in complaint(main, argv, capsys)
    assert not out.exists()


def test_a_conversation_wants_an_input(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    said = complaint(main, ["--model", str(tiny), "--interactive"], capsys)
    assert said == "--interactive: stdin is closed"
