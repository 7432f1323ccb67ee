"""The race to nanoGPT's loss: what it runs, reads and sums up."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastgpt2.errors import UserError
from tools import to_loss
from tools.optimizer_sweep import TARGET

PROGRAM = """
print("step 0: train loss 4.2, val loss 4.3000")
print("iter 0: loss 4.2", end="\\r")
print("step 10: validation loss 1.5000 nats/token, perplexity 4.48")
"""


def nanogpt(folder: Path) -> Path:
    """What is read of a checkout."""
    data = folder / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    (data / "prepare.py").write_text("open(__file__ + '.done', 'w').close()\n", encoding="utf-8")
    (folder / "train.py").write_text(f"{to_loss._SEED}\n", encoding="utf-8")
    return folder


def test_validations_of_either_are_read(tmp_path: Path) -> None:
    points = to_loss.curve(("-c", PROGRAM), tmp_path)
    assert [(p["step"], p["val_loss"]) for p in points] == [(0, 4.3), (10, 1.5)]
    assert 0 < points[0]["seconds"] <= points[1]["seconds"]


@pytest.mark.parametrize("program", ["print('nothing')", "import sys; sys.exit('broken')"])
def test_a_program_that_fails_is_named(program: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exit code"):
        to_loss.curve(("-c", program), tmp_path)


def test_both_run_by_turns_with_each_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, ran = tmp_path / "text", []
    text.write_text("to be", encoding="utf-8")

    def curve(command: Sequence[str], folder: Path) -> list[dict[str, float]]:
        if command[0] == "train.py":
            ran.append("nanogpt")
            assert (folder / "data" / "shakespeare_char" / "prepare.py.done").exists()
            seed = int(
                (folder / "train.py")
                .read_text(encoding="utf-8")
                .strip()[len("torch.manual_seed(") : -1]
            )
            assert (folder / "data" / "shakespeare_char" / "input.txt").read_text(
                encoding="utf-8"
            ) == "to be"
            points = [(250, 2.0, 30.0), (2000, 1.9, 200.0 + seed)]
        else:
            ran.append("fastgpt2")
            seed = int(command[-1].removeprefix("--seed="))
            points = [(450, TARGET, 50.0 + seed), (600, 1.8, 70.0)]
        return [{"step": a, "val_loss": b, "seconds": c} for a, b, c in points]

    monkeypatch.setattr(to_loss, "curve", curve)
    out = tmp_path / "out.json"
    program = [str(text), str(nanogpt(tmp_path / "nanogpt")), "--out", str(out)]
    assert to_loss.main(program) == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    assert ran == ["fastgpt2", "nanogpt", "nanogpt", "fastgpt2", "fastgpt2", "nanogpt"]
    assert record["summary"] == {
        "target": TARGET,
        "nanogpt": {
            "last_losses": [1.9, 1.9, 1.9],
            "steps": [2000, 2000, 2000],
            "seconds": [201.0, 202.0, 203.0],
        },
        "fastgpt2": {
            "last_losses": [1.8, 1.8, 1.8],
            "steps": [450, 450, 450],
            "seconds": [51.0, 52.0, 53.0],
        },
        "share_of_steps": 0.225,
        "share_of_seconds": round(52 / 202, 3),
    }


def test_another_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.copytree", None)
    text = tmp_path / "text"
    text.write_text("to be", encoding="utf-8")
    assert to_loss.main([str(text), str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "not a checkout of nanoGPT" in capsys.readouterr().err
