import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgpt2 import runs
from fastgpt2.errors import UserError
from fastgpt2.text import BytesTokenizer, load_tokenizer
from fastgpt2.text.prepared import PreparedWriter
from fastgpt2.train import checkpoint
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.config_file import read_config
from fastgpt2.train.metrics import COLUMNS, read_metrics
from fastgpt2.train.step import MAX_SKIPPED, TrainingStep
from fastgpt2.train.trainer import Trainer
from tests.train.tiny_run import make_trainer, saved_tensors, tiny_train_config, train

TRAINED = {"step", "tokens", "train_loss", "lr", "grad_norm", "tokens_per_second", "elapsed"}
VALIDATED = {"step", "tokens", "val_loss", "val_perplexity", "val_bits_per_byte", "elapsed"}


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny_train_config(data), run)
    return run


def test_what_a_run_folder_holds(finished: Path) -> None:
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    inside = ("gpt_config.json", "model.safetensors", "optimizer.safetensors", "state.json")
    assert names == {
        "config.toml",
        "fastgpt2_tokenizer.json",
        "loss.png",
        "metrics.csv",
        "metrics.jsonl",
        *(f"checkpoints/step_{step:08d}/{name}" for step in (6, 7) for name in inside),
    }


def test_nothing_in_it_is_a_pickle(finished: Path) -> None:
    for path in finished.rglob("*"):
        if path.is_file():
            # a pickle's first byte, and a zip's, in which PyTorch keeps its pickles
            assert not path.read_bytes().startswith((b"\x80", b"PK")), path


def test_config_and_tokenizer_are_there_to_read(finished: Path, data: Path) -> None:
    config = TrainConfig.from_layers(read_config(str(finished / "config.toml")))
    assert config == tiny_train_config(data)
    assert load_tokenizer(finished).name == "bytes"
    state = runs.read_state(runs.latest(finished))
    assert state["config"] == config.to_toml()
    assert state["tokenizer"] == f"bytes {load_tokenizer(finished).fingerprint}"


def test_records(finished: Path) -> None:
    records = read_metrics(finished)
    # every 2 steps, the first and the last; evaluations every 3 and at the end
    assert [r["step"] for r in records if "train_loss" in r] == [1, 2, 4, 6, 7]
    assert [r["step"] for r in records if "val_loss" in r] == [3, 6, 7]
    for record in records:
        assert set(record) == (VALIDATED if "val_loss" in record else TRAINED)
        assert set(record) <= set(COLUMNS)
        # 2 x 4 blocks of 16
        assert record["tokens"] == 128 * record["step"]
    with (finished / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    assert rows == records


def test_it_learns(finished: Path) -> None:
    losses = [r["val_loss"] for r in read_metrics(finished) if "val_loss" in r]
    # ln 257 is 5.55
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 4.8


@pytest.mark.usefixtures("no_picture")
def test_outcome(data: Path, tmp_path: Path) -> None:
    outcome = train(tiny_train_config(data), tmp_path)
    assert (outcome.step, outcome.tokens, outcome.exit_code) == (7, 7 * 128, 0)
    assert outcome.validation is not None
    assert outcome.validation.loss == read_metrics(tmp_path)[-1]["val_loss"]
    assert outcome.best_step == 7


@pytest.mark.usefixtures("no_picture")
def test_samples_do_not_disturb_training(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_train_config(data, sample_tokens=30, sample_prompt="the ")
    train(config, tmp_path)
    assert capsys.readouterr().out.count("  | the ") == 3
    ours, theirs = saved_tensors(tmp_path), saved_tensors(finished)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.usefixtures("no_picture")
def test_accumulation_does_not_change_the_data(data: Path, tmp_path: Path) -> None:
    """4 x 1 and 1 x 4 see the same blocks, and learn the same from them."""
    weights = []
    for grad_accum in (1, 4):
        run = tmp_path / str(grad_accum)
        fields: dict[str, Any] = dict(grad_accum=grad_accum, batch_size=4 // grad_accum, steps=3)
        train(tiny_train_config(data, dropout=0.0, warmup_steps=0, lr=1e-3, **fields), run)
        weights.append(checkpoint.load_model(runs.latest(run)).state_dict())
    for name, value in weights[0].items():
        # far below the 3e-3 that AdamW moves a weight in three steps
        assert (weights[1][name] - value).abs().max() < 2e-5, name


@pytest.mark.usefixtures("no_picture")
def test_a_run_by_epochs_and_one_by_time(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_train_config(data, steps=None, epochs=0.5), tmp_path / "epochs")
    blocks = trainer.loader.blocks_per_epoch
    assert trainer.run().step == -(-blocks // 16)
    outcome = train(tiny_train_config(data, steps=None, minutes=0.005), tmp_path / "time")
    assert outcome.elapsed >= 0.3
    assert outcome.validation is not None


def test_speed_is_that_of_training_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 1 second and an evaluation 100, by a clock of our own."""
    now = 0.0

    def spend(seconds: float, function: Any) -> Any:
        def wrapper(*args: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds
            return function(*args, **options)

        return wrapper

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(TrainingStep, "__call__", spend(1.0, TrainingStep.__call__))
    monkeypatch.setattr(
        "fastgpt2.train.trainer.validate", spend(100.0, lambda *args, **options: None)
    )
    monkeypatch.setattr("fastgpt2.train.trainer.plot", lambda *_: False)
    train(tiny_train_config(data, steps=10, log_every=2, eval_every=3), tmp_path)
    records = read_metrics(tmp_path)
    assert [record["tokens_per_second"] for record in records] == [128.0] * len(records)
    # while the time that has passed is all of it
    assert records[-1]["elapsed"] == 10 + 3 * 100


def poison_from(trainer: Trainer, step: int) -> str:
    """Bad gradients for one weight from some optimizer step on; returns its name."""
    name = "transformer.h.1.attn.c_proj.weight"
    weight: Any = trainer.model.get_parameter(name)

    def bad(grad: Tensor) -> Tensor:
        return torch.full_like(grad, torch.nan) if trainer.state.step >= step else grad

    weight.register_hook(bad)
    return name


def weights_at(run: Path, step: int) -> dict[str, Tensor]:
    return checkpoint.load_model(run / "checkpoints" / f"step_{step:08d}").state_dict()


def test_a_diverged_run_stops_and_keeps_its_last_checkpoint(data: Path, tmp_path: Path) -> None:
    config = tiny_train_config(data, steps=14, grad_accum=1, log_every=1, eval_every=4, keep_last=9)
    good, run = tmp_path / "good", tmp_path / "bad"
    train(config, good)
    trainer = make_trainer(config, run)
    name = poison_from(trainer, 4)
    with pytest.raises(UserError, match=f"first non-finite gradient: {name}") as error:
        trainer.run()
    assert "\n" not in str(error.value)
    assert f"at step {4 + MAX_SKIPPED}" in str(error.value)
    # a checkpoint in between has the weights of the last good step
    assert runs.saved_steps(run) == [4, 8]
    expected = weights_at(good, 4)
    for step in (4, 8):
        saved = weights_at(run, step)
        assert all(saved[name].equal(expected[name]) for name in expected)
    # the curves show what happened; what is not finite has no place in them
    assert (run / "loss.png").is_file()
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in lines
    assert "grad_norm" not in json.loads(lines.splitlines()[-1])


@pytest.mark.usefixtures("no_picture")
def test_a_checkpoint_without_a_finite_loss_is_never_the_best(data: Path, tmp_path: Path) -> None:
    """A learning rate of 1e30: the weights overflow, the gradient stays away."""
    config = tiny_train_config(data, lr=1e30, steps=6, eval_every=2, keep_last=1, weight_decay=0.0)
    train(config, tmp_path)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    state = runs.read_state(runs.latest(tmp_path))
    assert state["validation"] is None


@pytest.mark.parametrize(
    ("fields", "text", "message"),
    [
        ({}, "short", "training tokens: too short"),
        # these have no end-of-text id to predict
        ({"tokenizer": "char", "val_fraction": 0.001}, "x\n" * 50, "validation tokens: too short"),
        (
            {"tokenizer": "char", "sample_tokens": 5},
            "only these" * 50,
            r"sample_prompt: tokenizer char: '\\n' \(U\+000A\)",
        ),
        ({"device": "cuda:99"}, "x" * 100, "device 'cuda:99'"),
        ({"device": "meta"}, "x" * 100, "device 'meta': expected auto, cpu"),
        ({"n_head": 3}, "x" * 500, "n_embd must be a multiple of n_head"),
    ],
)
def test_what_can_be_checked_is_checked_before_the_first_step(
    tmp_path: Path, fields: dict[str, Any], text: str, message: str
) -> None:
    data = tmp_path / "text.txt"
    data.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        make_trainer(tiny_train_config(data, **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_implementation_that_cannot_run_is_refused_before_the_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgpt2.kernels.backend.INTERPRETED", False)
    config = tiny_train_config(tmp_path / "no such file", impl="triton")
    with pytest.raises(UserError, match="impl='triton' cannot run"):
        make_trainer(config, tmp_path / "run")


def test_a_run_folder_that_cannot_be_made(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    trainer = make_trainer(tiny_train_config(data), tmp_path / "file" / "run")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        trainer.run()


@pytest.mark.usefixtures("no_picture")
def test_token_shards_without_a_validation_split(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir()
    with PreparedWriter(folder, BytesTokenizer(), shard_tokens=500, source="here") as writer:
        writer.write("train", np.frombuffer(data.read_bytes(), np.uint8), 1)
    outcome = train(tiny_train_config(folder), tmp_path / "run")
    assert (outcome.validation, outcome.best_step) == (None, 7)
    assert not any("val_loss" in record for record in read_metrics(tmp_path / "run"))
