"""The comparison of losses: the differences are of FP8, and the yardstick is of the seeds."""

import json
from pathlib import Path

import pytest

from tools import loss_match

# as the configuration that the tool has by default, but small
CONFIG = """
tokenizer = "char"
model = "gpt2-nano"
block_size = 32
n_layer = 1
n_head = 2
n_embd = 32
batch_size = 4
lr = 1e-3
warmup_steps = 2
"""


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "text.txt", tmp_path / "match.json"
    data.write_text("".join(f"{i} cats and {i * i} dogs\n" for i in range(300)), encoding="utf-8")
    config = tmp_path / "small.toml"
    config.write_text(CONFIG, encoding="utf-8")
    options = ["--config", str(config), "--steps", "11", "--seeds", "1", "--device", "cpu"]
    assert loss_match.main(["--out", str(out), "--data", str(data), *options]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    # whose file it was is nobody's business
    assert report["config"]["data"] == ["text.txt"]
    (run,) = report["runs"]
    bf16, fp8 = (run[form]["train_loss"] for form in ("bf16", "fp8"))
    assert bf16.keys() == fp8.keys() and bf16 != fp8
    found = report["summary"]["val_loss"]
    assert found["fp8_minus_bf16"] == [run["fp8"]["val_loss"] - run["bf16"]["val_loss"]]
    assert abs(found["mean_difference"]) < 0.1
    assert "mean_difference" in capsys.readouterr().out


def test_the_summary() -> None:
    def form(end: float, validated: float) -> dict[str, object]:
        losses = {step: 9.0 for step in range(10)} | {step: end for step in range(10, 15)}
        return {"train_loss": losses, "val_loss": validated}

    runs = [
        {"bf16": form(2.0, 3.0), "fp8": form(2.25, 3.0)},
        {"bf16": form(2.5, 4.0), "fp8": form(2.5, 5.0)},
    ]
    found = loss_match.summary(runs)
    assert found["train_loss_at_the_end"]["fp8_minus_bf16"] == [0.25, 0.0]
    assert found["val_loss"]["mean_difference"] == 0.5
    assert found["val_loss"]["spread_of_bf16_over_seeds"] == 1.0


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert loss_match.main(["--out", str(tmp_path / "x"), "--seeds", "0"]) == 2
    assert "--seeds: must be 1 or more, got 0" in capsys.readouterr().err
