"""A disk that breaks while it is read, under every command: one line that names the file.

A command is a line of ``COMMANDS``: what it is given, where {disk} is the folder that breaks.
"""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from fastgpt2 import runs
from fastgpt2.__main__ import main
from fastgpt2.evaluate import report
from fastgpt2.picture import new_figure
from fastgpt2.prepare import main as prepare
from tests.commands.tiny_command import TEXT, TINY
from tests.faults import failing_reads
from tests.text.other_programs import write_llmc

CPU = "--device=cpu"
BYTES = "--tokenizer=bytes"
IDS = "--vocab-size=257"
TRAIN = ["train", "--out={out}", *TINY, "--steps=1"]
COMMANDS = {
    "train on text": [*TRAIN, "--data={disk}/a.txt"],
    "train on lines": [*TRAIN, "--data={disk}/a.jsonl"],
    "train on gzip": [*TRAIN, "--data={disk}/a.txt.gz"],
    "train on shards": ["train", "--out={out}", *TINY[1:], "--data={disk}/shards"],
    "train on ids": ["train", "--out={out}", *TINY[1:], IDS, "--data={disk}/ids.bin"],
    "train with a configuration": [*TRAIN, "--data={text}", "--config={disk}/config.toml"],
    "resume": ["train", "--out={run}", "--resume", "--steps=4"],
    "prepare": ["prepare", "--data={disk}/a.txt", "--out={out}", BYTES, "--workers=1"],
    "prepare ids": ["prepare", "--data={disk}/ids.bin", "--out={out}", IDS, "--workers=1"],
    "convert": ["convert", "{disk}/run", "{out}", "--to=hf"],
    "convert nanogpt": ["convert", "{disk}/ckpt.pt", "{out}", "--to=fastgpt2"],
    "convert llmc": ["convert", "{disk}/model.bin", "{out}", "--to=fastgpt2"],
    "evaluate": ["evaluate", "{disk}/run", "--data={disk}/a.txt", CPU, "--limit=9", "--out={out}"],
    "generate": ["generate", "--model={disk}/run", CPU, "--input={disk}/in", "--output=-"],
    "plot": ["plot", "{disk}/run", "--out={out}.png"],
}


@pytest.fixture(scope="module")
def disk(data: str, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the commands read."""
    folder = tmp_path_factory.mktemp("disk")
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    lines = "".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines())
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    (folder / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (folder / "config.toml").write_text("steps = 1\n", encoding="utf-8")
    (folder / "in").write_text("one\ntwo\n", encoding="utf-8")
    write_llmc(folder / "ids.bin", list(TEXT.encode()))
    shutil.copytree(finished, folder / "run")
    assert prepare(["--data", data, "--out", str(folder / "shards"), BYTES, "--workers=1"]) == 0
    forced = ["--gelu=tanh"]
    for to, name in (("nanogpt", "ckpt.pt"), ("llmc", "model.bin")):
        assert main(["convert", str(finished), str(folder / name), "--to", to, *forced]) == 0
    return folder


@pytest.mark.skipif(os.name == "nt", reason="names of open files")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_breaks_at_any_read(
    name: str,
    disk: Path,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "draw_text_scores", lambda *_: True)
    monkeypatch.setattr("fastgpt2.plot.paint_runs", lambda _: new_figure(0.2, 0.2))
    for n in range(1, 200):
        own, new = disk, tmp_path / str(n)
        if name == "resume":
            own = shutil.copytree(disk / "run", new)
        places = {"disk": own, "run": own, "out": new / "out", "text": data}
        argv = [word.format(**places) for word in COMMANDS[name]]
        before = sorted(map(str, disk.rglob("*")))
        capsys.readouterr()
        with failing_reads(n, own) as fault:
            code = main(argv)
        said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        if not fault.happened:
            break
        if code == 0:
            # a batch after the last step, which is read ahead
            run, steps = (new, [3, 4]) if name == "resume" else (new / "out", [3])
            assert argv[0] == "train" and runs.saved_steps(run) == steps
            continue
        assert code == 2 and len(said) == 1, (n, code, said)
        assert f"fastgpt2 {argv[0]}: error: " in said[0] and str(own) in said[0], (n, said)
        # the standard library takes it for another kind of file
        assert "Input/output error" in said[0] or "BadZipFile" in said[0], (n, said)
        assert sorted(map(str, disk.rglob("*"))) == before
        # what has been trained until then is saved
        run = new if name == "resume" else new / "out"
        assert not new.exists() or runs.saved_steps(run)
    assert code == 0 and n > 1
