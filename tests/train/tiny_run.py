"""Training runs that take a fraction of a second, and their results."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from fastgpt2 import runs
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.metrics import read_metrics
from fastgpt2.train.outcome import Outcome
from fastgpt2.train.trainer import Trainer
from fastgpt2.weights import load
from fastgpt2.weights.shards import WEIGHTS, read_shards

TEXT = "".join(f"the {i} cats and {i * i} dogs sat\n" for i in range(60))
# two records of one training differ only in these
TIMES = ("elapsed", "tokens_per_second", "mfu")


def tiny_train_config(data: Path, **fields: Any) -> TrainConfig:
    """Two layers of width 16, 7 steps of 2 x 4 blocks of 16 tokens, with dropout."""
    defaults: dict[str, Any] = dict(
        data=(str(data),),
        tokenizer="bytes",
        model="gpt2-nano",
        block_size=16,
        n_layer=2,
        n_head=2,
        n_embd=16,
        dropout=0.1,
        batch_size=4,
        grad_accum=2,
        steps=7,
        lr=1e-2,
        min_lr=1e-3,
        warmup_steps=2,
        log_every=2,
        eval_every=3,
        keep_last=2,
        sample_tokens=0,
        device="cpu",
    )
    return TrainConfig(**(defaults | fields))


def make_trainer(config: TrainConfig, run: Path, *, resume: bool = False) -> Trainer:
    return Trainer(config, run, resume=resume, notify=lambda line: None)


def train(config: TrainConfig, run: Path, *, resume: bool = False) -> Outcome:
    return make_trainer(config, run, resume=resume).run()


def saved_tensors(run: Path) -> dict[str, Tensor]:
    """Weights, moments and random-number states of the newest checkpoint."""
    folder = runs.latest(run)
    if (folder / runs.SHARDS).is_dir():
        found = read_shards(folder / runs.SHARDS, load(folder).config.vocab_size)
        return {name.removeprefix(WEIGHTS): tensor.read() for name, tensor in found.items()}
    return load_file(folder / runs.MODEL) | load_file(folder / runs.OPTIMIZER)


def saved_state(run: Path) -> dict[str, Any]:
    """The JSON of the newest checkpoint, without times."""
    folder = runs.latest(run)
    state: dict[str, Any] = json.loads((folder / runs.STATE).read_text(encoding="utf-8"))
    del state["elapsed"]
    if (folder / runs.SHARDS).is_dir():
        # the order of the tensors in these files is not always the same
        del state["sha256"]
    return state


def measured(run: Path) -> list[dict[str, Any]]:
    """The records of a run, without times."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(run)]


def assert_same_training(run: Path, expected: Path) -> None:
    """Bit for bit: weights, moments, random numbers, data position, losses, records."""
    ours, theirs = saved_tensors(run), saved_tensors(expected)
    assert ours.keys() == theirs.keys()
    different = [name for name in theirs if not ours[name].equal(theirs[name])]
    assert not different, f"differ: {different}"
    assert saved_state(run) == saved_state(expected)
    assert measured(run) == measured(expected)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a tiny run."""
    monkeypatch.setattr("fastgpt2.train.trainer.plot", lambda *_: False)
