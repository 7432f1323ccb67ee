"""Where a step's time goes: every operator counts once, for its purpose."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tools import step_budget


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (("aten::mm",), "matmul"),
        (("aten::mm", "fastgpt2::linear_cross_entropy_fwd"), "matmul"),
        (("aten::bmm", "fastgpt2::blocked_attention_bwd"), "attention"),
        (("aten::_softmax", "fastgpt2::blocked_attention_fwd"), "attention"),
        (("aten::_softmax", "fastgpt2::linear_cross_entropy_fwd"), "loss"),
        (("aten::copy_", "## Call CompiledFxGraph f3 ##"), "copies, casts, fills"),
        (("## Call CompiledFxGraph f3 ##", "CompiledFunction"), "compiled pointwise"),
        (("aten::_fused_adamw_", "Optimizer.step#AdamW.step"), "optimizer"),
        (("aten::view",), step_budget.REST),
    ],
)
def test_parts(names: tuple[str, ...], part: str) -> None:
    assert step_budget.part_of(names) == part


def test_a_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(name: str, command: Sequence[str]) -> Any:
        # the command that a new process would run, in this one: starting it takes half a minute
        assert command[:3] == [sys.executable, "-m", "tools.step_budget"]
        assert step_budget.main(command[3:]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    # its allocator setting is for a process that only trains
    monkeypatch.setattr(step_budget, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(step_budget, "ask", ask)
    out = tmp_path / "budget.json"
    options = ["--scale", "dry", "--dtype", "fp32", "--turns", "1", "--steps", "1"]
    assert step_budget.main(["--out", str(out), *options, "--contenders", "fastgpt2"]) == 0
    (run,) = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert run["name"] == "fastgpt2" and run["parts_ms"]["matmul"] > 0
    # an interpreter with PyTorch and a tiny model
    assert 10**8 < run["peak_bytes"] < 10**10
    assert "fastgpt2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--dtype", "bf16"], "at scale dry there is only fp32"),
        (["--dtype", "fp32", "--steps", "0"], "--steps: must be 1 or more, got 0"),
    ],
)
def test_mistakes_are_one_line(
    wrong: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step_budget.main(["--out", str(tmp_path / "x"), "--scale", "dry", *wrong]) == 2
    assert said in capsys.readouterr().err


def test_nobody_else_is_timed_under_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        step_budget.main(["--out", str(tmp_path / "x"), "--contenders", "nobody"])
