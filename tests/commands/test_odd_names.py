"""Every command with odd names: a line break, LaTeX's and Markdown's marks, bytes that are no text.

TMPDIR names no folder, either.
"""

import os
import shlex
import sys
import tempfile
from pathlib import Path

import pytest

from fastgpt2.convert import main as convert
from fastgpt2.evaluate import report
from fastgpt2.evaluate.__main__ import main as evaluate
from fastgpt2.generate.__main__ import main as generate
from fastgpt2.picture import new_figure
from fastgpt2.plot import main as plot
from fastgpt2.prepare import main as prepare
from fastgpt2.train.__main__ import main as train
from tests.commands.tiny_command import TEXT, TINY, complaint

BYTES = os.fsdecode(b"caf\xe9 |`")
linux = pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8")


@pytest.mark.parametrize("name", ["a\n$x_{$ [*]", pytest.param(BYTES, marks=linux)])
def test_every_command_takes_every_name(
    tmp_path: Path,
    tiny: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # no file can be made there: Python takes another folder
    monkeypatch.setenv("TMPDIR", os.devnull)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(report, "draw_text_scores", lambda *_: True)
    monkeypatch.setattr("fastgpt2.plot.paint_runs", lambda _: new_figure(0.2, 0.2))
    folder = tmp_path / name
    folder.mkdir()
    text, model, shards, out = (str(folder / f"{part} {name}") for part in ("t", "m", "p", "o"))
    Path(text).write_text(TEXT, encoding="utf-8")
    options = ["--tokenizer=bytes", "--workers=1"]
    assert prepare(["--data", text, "--out", shards, *options]) == 0
    # what is to be copied into a shell stands in quotes; a terminal shows no bytes that are no text
    shown = shards.encode("utf-8", "backslashreplace").decode()
    assert f"--data {shlex.quote(shown)}\n" in capsys.readouterr().out
    assert convert([str(tiny), model, "--to", "fastgpt2"]) == 0
    if name == BYTES:
        # safetensors opens no such file
        said = complaint(generate, ["--model", model, "--device=cpu"], capsys)
        assert said.endswith(
            "model.safetensors: the path must be UTF-8 text for the library safetensors"
        )
        model = str(tiny)
    for data in (text, shards):
        flags = ["--device=cpu", "--limit=20", "--out", f"{out}{len(data)}"]
        assert evaluate([model, "--data", data, *flags]) == 0
        table = (Path(f"{out}{len(data)}") / "evaluation.md").read_text(encoding="utf-8")
        # seven lines say what was done, then comes the table
        assert table.count("\n- ") == 7 and "\n\n| model " in table
    flags = ["--max-new-tokens=2", "--device=cpu", "--prompt=a", "--output", f"{out}.jsonl"]
    assert generate(["--model", model, *flags]) == 0
    run, data = folder / "run", text
    if name == BYTES:
        # the configuration is TOML, which is UTF-8
        said = complaint(train, ["--data", text, "--out", str(tmp_path / "run"), *TINY], capsys)
        assert "config: data must be UTF-8 text" in said
        data = str(tmp_path / "t.txt")
        Path(data).write_text(TEXT, encoding="utf-8")
        said = complaint(train, ["--data", data, "--out", str(run), *TINY], capsys)
        assert said.startswith("--out ") and "must be UTF-8 text" in said
        run = tmp_path / "run"
    assert train(["--data", data, "--out", str(run), *TINY, "--steps=1"]) == 0
    assert train(["--out", str(run), "--resume", "--steps=2"]) == 0
    assert plot([str(run), "--out", f"{out}.svg"]) == 0
    assert "Traceback" not in capsys.readouterr().err
