"""Two processes that share an evaluation get what one gets."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastgpt2.evaluate.__main__ import main
from tests.evaluate.small import HELLASWAG, TEXT, byte_gpt, save_run, write_lines

# both evaluations in one start of Python, in the group that torchrun's variables describe
SCRIPT = """
import sys
from fastgpt2.evaluate.__main__ import main
from fastgpt2.evaluate import report
from fastgpt2.distributed import process_group
report.draw_text_scores = report.draw_metrics = lambda *arguments: None
with process_group():
    for line in sys.argv[1:]:
        assert main(line.split()) == 0
"""


def numbers(value: Any) -> list[float]:
    """All numbers in a piece of JSON, in order."""
    if isinstance(value, dict):
        return [x for item in value.values() for x in numbers(item)]
    if isinstance(value, list):
        return [x for item in value for x in numbers(item)]
    return [value] if isinstance(value, int | float) else []


def test_two_processes_equal_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(byte_gpt(), tmp_path / "run")
    # nothing that is there twice, so that the worst tokens have no ties
    (tmp_path / "text").write_text(f"{TEXT[:60]} What, {TEXT[-7:]}", encoding="utf-8")
    write_lines(tmp_path / "h", HELLASWAG)
    common = f"{run} --device cpu --batch-size 2 --data {tmp_path}"
    lines = [f"{common}/text --stride 5", f"{common}/h --task hellaswag"]
    for name, line in zip(("text1", "task1"), lines, strict=True):
        assert main(f"{line} --out {tmp_path / name}".split()) == 0
    alone = capsys.readouterr().out
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    commands = [
        f"{line} --out {tmp_path / name}"
        for name, line in zip(("text2", "task2"), lines, strict=True)
    ]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *commands],
            env=os.environ | group | {"RANK": str(rank), "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "processes: 2" in outputs[0]
    # the tables are the same, and one process alone prints them
    tables = [[x for x in out.splitlines() if x.startswith("|")] for out in (alone, outputs[0])]
    assert tables[0] == tables[1] and len(tables[0]) == 6
    assert outputs[1] == ""
    for task in ("text", "task"):
        one, two = (
            json.loads((tmp_path / f"{task}{n}" / "evaluation.json").read_text(encoding="utf-8"))
            for n in (1, 2)
        )
        assert numbers(two["models"]) == pytest.approx(numbers(one["models"]), rel=1e-6, abs=1e-6)
        assert len(numbers(two["models"])) >= 4
