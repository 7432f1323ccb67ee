"""``fastgpt2 generate`` with many prompts: files in, JSON Lines out, scores, resumed files."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastgpt2.generate.__main__ import main
from fastgpt2.model import GPT
from tests.commands.tiny_command import complaint
from tests.commands.tiny_generate import generate, records

PROMPTS = ["the cat", "a", "longer than the window of the model", "the cat", "é🙂"]
LINES = [
    {"prompt": "the", "id": "first", "max_new_tokens": 3},
    {"ids": [104, 105], "temperature": 0, "samples": 1},
    {"prompt": "b", "seed": 77, "best_of": 3},
    {"prompt": "c", "num_beams": 3, "samples": 2, "length_penalty": 0.5},
    {"prompt": "d", "stop": ["e", 7], "logit_bias": {"101": 90}, "min_new_tokens": 2},
    {"prompt": "", "max_new_tokens": 0, "top_k": None},
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\r\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return path


def test_a_text_is_the_same_in_whatever_batch(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    found = []
    for size in ("1", "3", "8"):
        path = tmp_path / size
        generate(tiny, f"--input={prompts}", f"--output={path}", f"--batch-size={size}")
        found.append([(r["ids"], r["text"], r["seed"]) for r in records(path)])
    assert found[0] == found[1] == found[2]
    assert [r["prompt"] for r in records(path)] == PROMPTS
    # blank lines are left out, and counted
    assert [r["index"] for r in records(path)] == [0, 2, 4, 6, 8]
    # a prompt that comes again gets another text
    assert found[0][0] != found[0][3] and found[0][3][2] == 6
    alone = tmp_path / "alone"
    generate(tiny, "--prompt", PROMPTS[2], f"--output={alone}")
    assert records(alone)[0]["ids"] == found[0][2][0]


def test_lines_of_json_have_options_of_their_own(tiny: Path, lines: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    generate(tiny, f"--input={lines}", f"--output={out}", "--batch-size=2")
    found = records(out)
    assert [(r["index"], r["sample"], r.get("id")) for r in found] == [
        (0, 0, "first"), (1, 0, None), (2, 0, None), (3, 0, None), (3, 1, None), (4, 0, None),
        (5, 0, None),
    ]  # fmt: skip
    first, greedy, best, beam, second, stopped, nothing = found
    assert len(first["ids"]) == 3 and first["finish_reason"] == "length"
    model = GPT.from_pretrained(tiny).eval()
    whole = model.generate([[104, 105]], 9, temperature=0.0, window="slide", stop=256)[0]
    assert greedy["ids"] == whole[2:]
    assert best["seed"] == 77
    assert sum(beam["log_probs"]) / 9**0.5 >= sum(second["log_probs"]) / 9**0.5
    # the bias makes every token an e, which is a stop string
    assert (stopped["text"], stopped["ids"], stopped["finish_reason"]) == ("", [101], "stop")
    assert (nothing["ids"], nothing["finish_reason"]) == ([], "length")
    for record, prompt in ((first, b"the"), (greedy, b"hi"), (beam, b"c"), (second, b"c")):
        ids = record["ids"]
        scores = model.log_probs([[*prompt, *ids]])[0][len(prompt) - 1 :]
        assert record["log_probs"] == pytest.approx(scores, abs=1e-4)


def test_the_best_of_several_is_the_likeliest(tiny: Path, tmp_path: Path) -> None:
    # they are the samples of the same seeds
    generate(tiny, "--prompt=x", "--samples=4", f"--output={tmp_path / 'all'}")
    generate(tiny, "--prompt=x", "--best-of=4", f"--output={tmp_path / 'best'}")
    found = records(tmp_path / "all")
    means = [sum(r["log_probs"]) / len(r["log_probs"]) for r in found]
    (best,) = records(tmp_path / "best")
    assert best["ids"] == found[means.index(max(means))]["ids"]
    assert len({tuple(r["ids"]) for r in found}) == 4
    # in Python, too
    model = GPT.from_pretrained(tiny)
    options: dict[str, Any] = {"temperature": 0.8, "seed": 5, "window": "slide"}
    assert model.generate([[*b"x"]], 9, best_of=4, **options) == [[*b"x", *best["ids"]]]


def test_texts_on_stdout_are_those_of_the_file(
    tiny: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(tiny, f"--input={prompts}", f"--output={tmp_path / 'out'}")
    assert capsys.readouterr().out == ""
    generate(tiny, f"--input={prompts}", "--batch-size=2")
    said = capsys.readouterr()
    expected = [r["prompt"] + r["text"] + "\n" for r in records(tmp_path / "out")]
    assert said.out == "---\n".join(expected)
    assert " tokens/s, the first after " in said.err and said.err.count("\n") == 1
    generate(tiny, "--input=-", "--output=-", typed=prompts.read_bytes())
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(shown, key=lambda r: r["index"]) == records(tmp_path / "out")


@pytest.mark.parametrize("size", ["1", "3"])
def test_scores_are_those_of_the_model(
    tiny: Path, prompts: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    assert (
        main(["--model", str(tiny), "--score", "--input", str(prompts), "--batch-size", size]) == 0
    )
    model = GPT.from_pretrained(tiny).eval()
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["prompt"] for r in found] == PROMPTS
    for record in found:
        ids = [*record["prompt"].encode()]
        expected = model.log_probs([ids])[0]
        assert record["ids"] == ids and record["log_probs"][0] is None
        assert record["log_probs"][1:] == pytest.approx(expected, abs=1e-5)
        assert record["total"] == pytest.approx(sum(expected), abs=1e-4)


def test_a_file_is_never_replaced_unasked(
    tiny: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n", encoding="utf-8")
    argv = ["--model", str(tiny), "--input", str(prompts), "--output", str(out)]
    assert "exists already; --resume goes on" in complaint(main, argv, capsys)
    assert "line 1 of" in complaint(main, [*argv, "--resume"], capsys)
    assert "is the file of --input" in complaint(
        main, [*argv[:-1], str(prompts), "--overwrite"], capsys
    )
    # what fails before the first result leaves the old file
    assert "--prompt" in complaint(main, [*argv, "--overwrite", "--prompt", "x"], capsys)
    assert out.read_text(encoding="utf-8") == "mine\n"
    generate(tiny, *argv[2:], "--overwrite")
    assert [r["prompt"] for r in records(out)] == PROMPTS


def test_a_file_that_was_cut_off_is_completed(
    tiny: Path, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    flags = [f"--input={lines}", f"--output={out}"]
    generate(tiny, *flags)
    whole, texts = out.read_bytes(), [(r["index"], r["ids"]) for r in records(out)]
    for end in (0, 10, len(whole) // 2, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:end])
        generate(tiny, *flags, "--resume")
        assert out.read_bytes().startswith(whole[: whole.rfind(b"\n", 0, end) + 1])
        assert [(r["index"], r["ids"]) for r in records(out)] == texts
    said = complaint(
        main, ["--model", str(tiny), "--prompt=x", f"--output={out}", "--resume"], capsys
    )
    assert "has a result of another prompt: " in said


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"mine, without a line break", 1),
        (b"a\xff\0b", 1),
        (b'{"index": 1e999, "prompt": "a", "finish_reason": "stop"}\n', 1),
        (b'{"index": true, "prompt": "a", "finish_reason": "stop"}\n', 1),
        (b'{"index": 0, "prompt": "a", "ids": [97], "log_probs": [null], "total": 0}\n', 1),
        (b'{"index": 0, "prompt": "a", "finish_reason": "stop"}\nand a note', 2),
    ],
    ids=["text", "bytes", "infinity", "true", "scores", "a note"],
)
def test_what_is_not_a_result_is_never_lost(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, line: int
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(content)
    argv = ["--model", str(tiny), "--prompt=a", f"--output={out}", "--resume"]
    said = complaint(main, argv, capsys)
    assert said == f"--resume: line {line} of {out} is not a result of this command"
    assert out.read_bytes() == content
