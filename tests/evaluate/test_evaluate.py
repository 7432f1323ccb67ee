import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt2 import streams
from fastgpt2.evaluate import report
from fastgpt2.evaluate.__main__ import main
from fastgpt2.text import BytesTokenizer, GPT2Tokenizer, save_tokenizer
from fastgpt2.text.prepared import PreparedWriter
from fastgpt2.weights import FORMATS, load, save
from tests.evaluate.small import HELLASWAG, LAMBADA, TEXT, byte_gpt, save_run, write_lines
from tests.text.tiny import tiny_files
from tests.weights.conftest import GOLDEN


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures have tests of their own, and take longer than the rest."""
    for name in ("draw_text_scores", "draw_metrics"):
        monkeypatch.setattr(report, name, lambda *arguments: None)


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(save_run(byte_gpt(), tmp_path / "run"))


def evaluate(*arguments: str, out: Path) -> dict[str, dict[str, Any]]:
    """The records of the models, by name."""
    assert main([*arguments, "--device", "cpu", "--offline", "--out", str(out)]) == 0
    models: dict[str, dict[str, Any]] = json.loads(
        (out / "evaluation.json").read_text(encoding="utf-8")
    )["models"]
    return models


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command ends with, and code 2."""
    try:
        code = main([*arguments, "--device", "cpu", "--offline"])
    except SystemExit as error:
        code = int(str(error.code))
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("fastgpt2 evaluate: error: ") and err.count("\n") == 1
    return err


def test_every_format_gives_equal_numbers(tmp_path: Path, data: str) -> None:
    names = [str(GOLDEN)]
    for format in FORMATS:
        names.append(str(save(load(GOLDEN), tmp_path / format, format)))
    # the run brings its tokenizer, the others get the flag's
    save_tokenizer(BytesTokenizer(), tmp_path / "fastgpt2")
    scores = evaluate(*names, "--data", data, "--tokenizer", "bytes", out=tmp_path / "out")
    first = scores[str(GOLDEN)]
    assert len(scores) == 1 + len(FORMATS) and first["tokens_scored"] == len(TEXT.encode()) - 1
    assert 2 < first["loss"] < 20
    for score in scores.values():
        assert score == first


def test_what_is_printed(
    data: str, run: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    score = evaluate(run, "--data", data, "--stride", "5", out=tmp_path / "out")[run]
    out = capsys.readouterr().out
    for said in (
        f"data: {data} (split all)",
        f"{len(TEXT.encode())} bytes tokens",
        "detokenizer: none",
        f"word-perplexity: {len(TEXT.split())} words",
        f"| {run} |      24 |      5 |",
        f"{score['loss']:.4f}",
        f"{score['bits_per_byte']:.4f}",
        f"report: {tmp_path / 'out'}",
    ):
        assert said in out


def test_progress_is_shown_on_a_terminal(
    data: str, run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [run, "--data", data, "--device", "cpu", "--limit", "60"]
    assert main(arguments) == 0
    assert "scoring" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    # what ends in a second needs no bar
    assert main(arguments) == 0
    assert "scoring" not in capsys.readouterr().err
    monkeypatch.setattr(streams, "BAR_DELAY", 0.0)
    assert main(arguments) == 0
    err = capsys.readouterr().err
    assert "scoring: " in err and "batch" in err and "model" in err


def test_tokenizer_beside_the_weights(tmp_path: Path, data: str) -> None:
    encoder, merges = tiny_files()
    tokenizer = GPT2Tokenizer(encoder, merges)
    model = byte_gpt(vocab_size=tokenizer.vocab_size)
    folder = save_run(model, tmp_path / "run")
    (folder / "fastgpt2_tokenizer.json").unlink()
    save(load(folder), tmp_path / "hf", "hf")
    for name, text in (("vocab.json", encoder), ("merges.txt", merges)):
        (tmp_path / "hf" / name).write_text(text, encoding="utf-8")
    save_tokenizer(tokenizer, folder)
    step = folder / "checkpoints" / "step_00000000"
    names = [str(tmp_path / "hf"), str(folder), str(step)]
    scores = evaluate(*names, "--data", data, out=tmp_path / "out")
    assert scores[names[0]] == scores[names[1]] == scores[names[2]]
    # merges make fewer tokens of the same bytes
    score = scores[names[0]]
    assert score["tokens_scored"] == len(tokenizer.encode(TEXT)) - 1 < len(TEXT.encode()) - 50
    assert score["bytes_scored"] == len(TEXT.encode()) - 1


def test_best_checkpoint_of_a_run(tmp_path: Path, data: str, run: str) -> None:
    other = save_run(byte_gpt(1), tmp_path / "other")
    steps = Path(run) / "checkpoints"
    shutil.copytree(other / "checkpoints" / "step_00000000", steps / "step_00000007")
    for step, loss in ((0, 1.5), (7, 2.5)):
        state = {"step": step, "validation": {"loss": loss}}
        (steps / f"step_{step:08d}" / "state.json").write_text(json.dumps(state), encoding="utf-8")
    best = evaluate(run, "--data", data, out=tmp_path / "a")[run]["loss"]
    latest = evaluate(run, "--data", data, "--checkpoint", "latest", out=tmp_path / "b")[run]
    both = evaluate(str(steps / "step_00000000"), str(other), "--data", data, out=tmp_path / "c")
    assert [best, latest["loss"]] == [score["loss"] for score in both.values()]
    assert best != latest["loss"]


def test_shards_splits_and_limit(tmp_path: Path, data: str, run: str) -> None:
    tokenizer, ids = BytesTokenizer(), np.frombuffer(TEXT.encode(), np.uint8).astype(np.uint16)
    cut = TEXT.encode().index(b"\n", int(0.9 * len(ids)))
    with PreparedWriter(tmp_path / "s", tokenizer, shard_tokens=100, source="x") as writer:
        writer.write("train", ids[:cut], cut)
        writer.write("val", ids[cut:], len(ids) - cut)
    (tmp_path / "val.txt").write_bytes(TEXT.encode()[cut:])
    shards = evaluate(run, "--data", str(tmp_path / "s"), out=tmp_path / "a")[run]
    text = evaluate(run, "--data", str(tmp_path / "val.txt"), out=tmp_path / "b")[run]
    assert shards["words"] is None and text["words"] > 0
    assert (shards["loss"], shards["bits_per_byte"]) == (text["loss"], text["bits_per_byte"])
    splits = [
        evaluate(run, "--data", data, "--split", s, out=tmp_path / s)[run]["tokens"]
        for s in ("train", "val", "all")
    ]
    # as training has it, the document ends: not so where all of it is scored
    assert splits[0] + splits[1] - 1 == splits[2] == len(ids)
    assert splits[1] == pytest.approx(len(ids) / 10, abs=4)
    limited = evaluate(run, "--data", data, "--limit", "30", out=tmp_path / "l")[run]
    assert (limited["tokens"], limited["words"]) == (30, None)


def test_tasks(tmp_path: Path, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    h = str(write_lines(tmp_path / "h", HELLASWAG))
    lam = str(write_lines(tmp_path / "l", [{"text": text} for text in LAMBADA]))
    for task, path, names in (
        ("hellaswag", h, {"accuracy", "accuracy_norm"}),
        ("lambada", lam, {"accuracy", "perplexity"}),
    ):
        metrics = evaluate(run, "--task", task, "--data", path, out=tmp_path / task)[run]
        assert set(metrics) == names
        out = capsys.readouterr().out
        assert "not the published file" in out and "zero-shot" in out and " ± " in out


def test_mistakes_are_one_line(
    tmp_path: Path, data: str, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def message(*arguments: str) -> str:
        return failure(capsys, *arguments)

    golden = str(GOLDEN)
    tiny = str(save_run(byte_gpt(vocab_size=100), tmp_path / "tiny"))
    assert "--data: give a text to score" in message(run)
    assert "no such file or folder" in message("nowhere", "--data", data)
    assert "given twice" in message(run, run, "--data", data)
    assert "no tokenizer beside it" in message(golden, "--data", data)
    assert "the tokenizer bytes has 257 ids, the model 100" in message(tiny, "--data", data)
    assert "--context must be in [2, 25]" in message(run, "--data", data, "--context", "26")
    assert "--context must be in" in message(run, "--data", data, "--context", "0")
    assert "--stride must be in [1, 24]" in message(run, "--data", data, "--stride", "0")
    assert "--batch-size must be" in message(run, "--data", data, "--batch-size", "0")
    assert "--limit must be" in message(run, "--data", data, "--limit", "-1")
    assert "no file, folder, pattern" in message(run, "--data", str(tmp_path / "none"))
    task = ("--task", "hellaswag")
    assert "line 1: Expecting value" in message(run, *task, "--data", data)
    assert "takes one file" in message(run, *task, "--data", data, data)
    assert "--stride is for text" in message(run, *task, "--data", data, "--stride", "3")
    assert f"{data}: File exists" in message(run, "--data", data, "--out", data)
    assert "invalid choice: 'winogrande'" in message(run, "--task", "winogrande")
    (tmp_path / "one").write_bytes(b"x")
    assert "1 tokens, at least 2" in message(run, "--data", str(tmp_path / "one"))
    if not torch.cuda.is_available():
        arguments = [run, "--data", data, "--device", "cuda"]
        assert main(arguments) == 2


def test_bad_shards(tmp_path: Path, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = GPT2Tokenizer(*tiny_files())
    folder = tmp_path / "s"
    with PreparedWriter(folder, tokenizer, shard_tokens=100, source="x") as writer:
        writer.write("train", np.arange(50, dtype=np.uint16), 50)
    assert "tokens of gpt2" in failure(capsys, run, "--data", str(folder))
    said = failure(capsys, run, "--data", str(folder), "--detokenizer", "wikitext")
    assert "holds tokens, not text" in said
    assert "--split val: " in failure(capsys, run, "--data", str(folder), "--split", "val")
