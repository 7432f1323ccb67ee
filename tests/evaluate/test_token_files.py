"""``evaluate`` on the token files of other programs."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastgpt2.evaluate import report
from fastgpt2.evaluate.__main__ import main
from tests.evaluate.small import TEXT, byte_gpt, save_run
from tests.text.other_programs import write_llmc, write_meta, write_nanogpt

IDS = list(TEXT.encode())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(report, "draw_text_scores", lambda *arguments: None)
    return str(save_run(byte_gpt(), tmp_path / "run"))


def evaluate(run: str, *arguments: str, out: Path) -> dict[str, Any]:
    assert main([run, *arguments, "--device", "cpu", "--offline", "--out", str(out)]) == 0
    content = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    score: dict[str, Any] = content["models"][run]
    return score


def test_token_files_score_as_their_text(run: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    text = evaluate(run, "--data", str(tmp_path / "text.txt"), out=tmp_path / "a")
    llmc = write_llmc(tmp_path / "x.bin", IDS)
    score = evaluate(run, "--data", str(llmc), out=tmp_path / "b")
    assert (score["loss"], score["bits_per_byte"]) == (text["loss"], text["bits_per_byte"])
    nano = write_nanogpt(tmp_path / "nano", IDS[:5], IDS)
    score = evaluate(run, "--data", str(nano), out=tmp_path / "c")
    assert score["loss"] == text["loss"]
    parts = [
        evaluate(run, "--data", str(llmc), "--split", split, out=tmp_path / split)["tokens"]
        for split in ("train", "val", "all")
    ]
    assert parts[0] + parts[1] == parts[2] == len(IDS) and 0 < parts[1] < parts[0]


@pytest.mark.parametrize("flaw", ["id", "meta", "split", "detokenizer"])
def test_mistakes_are_one_line(
    flaw: str, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nano = write_nanogpt(tmp_path / "nano", IDS, [5, 6, 300 if flaw == "id" else 7])
    arguments = []
    if flaw == "id":
        message = f"token file {nano / 'val.bin'}: id 300 at position 2 is not in"
    elif flaw == "meta":
        write_meta(nano, "abc")
        message = "are of a vocabulary of their own"
    elif flaw == "split":
        arguments = ["--split", "all"]
        message = "--split all: by their names, the token files are train, val"
    else:
        arguments = ["--detokenizer", "wikitext"]
        message = "holds tokens, not text"
    argv = [run, "--data", str(nano), *arguments, "--device", "cpu", "--offline"]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
