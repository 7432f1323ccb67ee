"""``--profile``: a trace and a table of where a step went."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

from fastgpt2.errors import UserError
from fastgpt2.train.profiling import PHASES, TABLE, TRACE, WARMUP, StepProfile, step_table
from tests.train.tiny_run import make_trainer, saved_tensors, tiny_train_config, train

pytestmark = pytest.mark.usefixtures("no_picture")


def test_a_trace_and_a_table_and_the_same_training(data: Path, tmp_path: Path) -> None:
    train(tiny_train_config(data), tmp_path / "plain")
    train(tiny_train_config(data, profile=2), tmp_path / "run")
    ours, theirs = saved_tensors(tmp_path / "run"), saved_tensors(tmp_path / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    trace = json.loads((tmp_path / "run" / TRACE).read_text(encoding="utf-8"))
    names = [event.get("name") for event in trace["traceEvents"] if event.get("ph") == "X"]
    # two steps of two micro-batches
    assert {name: names.count(name) for name in PHASES} == {
        **{"data": 2, "forward": 4, "backward": 4, "update": 2}
    }
    table = (tmp_path / "run" / TABLE).read_text(encoding="utf-8")
    assert table.startswith("2 steps recorded; ms per step\n")
    rows = re.findall(r"^  (\S+) +(\S+) x +(\S+)$", table, re.MULTILINE)
    calls = {name: float(count) for name, count, _ in rows}
    assert [name for name, _, _ in rows[:4]] == list(PHASES)
    assert calls["forward"] == 2 and calls["update"] == 1
    assert all(float(ms) > 0 for name, _, ms in rows if name in PHASES)
    assert any(name.startswith("aten::") for name in calls)


def test_a_name_that_is_longer_than_the_column_keeps_both_ends() -> None:
    name = "an operator of a library: " + 99 * "x" + " its name"
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile, record_function(name):
        torch.ones(2).sum()
    table = step_table(profile.key_averages(), 1)
    assert re.search(r"^  an operator of a lib\.\.\.x+ its name +1 x", table, re.MULTILINE), table


def test_a_run_that_is_shorter_than_it_asks_for(data: Path, tmp_path: Path) -> None:
    train(tiny_train_config(data, steps=WARMUP + 1, profile=50), tmp_path / "short")
    assert "1 steps recorded" in (tmp_path / "short" / TABLE).read_text(encoding="utf-8")
    said: list[str] = []
    shorter = StepProfile(5, tmp_path, torch.device("cpu"), said.append)
    shorter.step()
    shorter.close()
    assert said == [f"profile: nothing recorded; the first {WARMUP} steps are for warm-up"]
    assert not (tmp_path / TRACE).exists()


def test_a_profiler_that_fails_ends_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_train_config(data, profile=1), tmp_path)
    said: list[str] = []
    monkeypatch.setattr(trainer.profile, "_notify", said.append)
    (tmp_path / TRACE).mkdir(parents=True)
    assert trainer.run().step == 7
    [line] = said
    assert line.startswith("profile: failed (") and "\n" not in line


def test_a_number_below_zero_is_refused(data: Path) -> None:
    with pytest.raises(UserError, match="profile must be 0 or more"):
        tiny_train_config(data, profile=-1)
