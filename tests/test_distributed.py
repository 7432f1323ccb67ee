"""Two processes that share an evaluation get what one gets."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastgpt2.evaluate.__main__ import main
from tests.evaluate.small import HELLASWAG, TEXT, byte_gpt, save_run, write_lines

# both evaluations in one start of Python, in the group that torchrun's variables describe
SCRIPT = """
import os
import sys
from functools import partial
from pathlib import Path
from torch.distributed import TCPStore
from fastgpt2.evaluate.__main__ import main
from fastgpt2.evaluate import report
from fastgpt2.distributed import process_group
from tools.forked import fork_rank

report.draw_text_scores = report.draw_metrics = lambda *arguments: None
folder, *lines = sys.argv[1:]

def evaluate():
    with process_group():
        return max(main(line.split()) for line in lines)

store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
ranks = [
    fork_rank(evaluate, rank, 2, port=store.port, said=Path(folder)) for rank in range(2)
]
assert not any(os.waitpid(rank, 0)[1] for rank in ranks)
"""


def numbers(value: Any) -> list[float]:
    """All numbers in a piece of JSON, in order."""
    if isinstance(value, dict):
        return [x for item in value.values() for x in numbers(item)]
    if isinstance(value, list):
        return [x for item in value for x in numbers(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
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
    commands = [
        f"{line} --out {tmp_path / name}"
        for name, line in zip(("text2", "task2"), lines, strict=True)
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), *commands],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=200,
        check=False,
    )
    outputs, errors = (
        [(tmp_path / f"{name}.{rank}").read_text(encoding="utf-8") for rank in range(2)]
        for name in ("out", "err")
    )
    assert done.returncode == 0, errors
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
