"""The race of the default run by two optimizers: what it runs and sums up."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastgpt2.text.tokenizers import BytesTokenizer
from tools import default_run


def points(*values: tuple[int, float, float]) -> list[dict[str, float]]:
    return [{"step": step, "val_loss": loss, "seconds": at} for step, loss, at in values]


def test_both_run_by_turns_and_are_compared_at_adamws_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    # what a run leaves: the vocabulary is asked of its tokenizer
    monkeypatch.setattr(default_run, "find_tokenizer", lambda run: BytesTokenizer())

    def curve(command: Sequence[str], folder: Path) -> list[dict[str, float]]:
        assert "--compile" in command and "--config=cpu" in command
        who = next(c.removeprefix("--optimizer=") for c in command if "--optimizer" in c)
        ran.append((who, command[-1]))
        if who == "adamw":
            return points((200, 3.0, 150.0), (300, 2.5, 200.0))
        return points((10, 4.0, 20.0), (100, 2.5, 80.0), (110, 2.6, 90.0), (240, 1.0, 190.0))

    monkeypatch.setattr(default_run, "curve", curve)
    out = tmp_path / "out.json"
    assert default_run.main(["--out", str(out)]) == 0
    assert ran == [
        ("adamw", "--seed=1"),
        ("muon", "--seed=1"),
        ("muon", "--seed=2"),
        ("adamw", "--seed=2"),
    ]
    record = json.loads(out.read_text(encoding="utf-8"))
    assert {run["vocab_size"] for run in record["runs"]} == {257}
    summary = record["summary"]
    assert summary["share_of_seconds"] == 0.4
    assert [pair["muon"]["step"] for pair in summary["pairs"]] == [100, 100]


def test_a_loss_that_is_not_reached_has_no_share() -> None:
    runs = [
        {"who": "adamw", "seed": 1, "curve": points((300, 2.5, 200.0))},
        {"who": "muon", "seed": 1, "curve": points((240, 2.6, 190.0))},
    ]
    assert default_run.summary(runs)["share_of_seconds"] is None
    assert default_run.summary(runs[:1]) == {"pairs": [], "share_of_seconds": None}
