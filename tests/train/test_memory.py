"""The estimate of a step's memory against what the profiler counts, and what is made of it."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt2.config import GPTConfig
from fastgpt2.devices import device_kind
from fastgpt2.errors import UserError
from fastgpt2.lora import add_lora
from fastgpt2.model import GPT
from fastgpt2.text.packing import packed
from fastgpt2.train import checkpoint, memory
from fastgpt2.train.__main__ import build_parser
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.config_file import read_config
from fastgpt2.train.memory import estimate
from fastgpt2.train.optimizers import build_optimizer, moment_bytes
from fastgpt2.train.remat import set_remat
from fastgpt2.train.step import TrainingStep
from tests.kernels.processors import ALWAYS, NEVER, give_onednn
from tests.tiny_gpt import gradients, tiny_batch
from tests.train.step_memory import SMALL, measured
from tests.train.tiny_run import make_trainer, tiny_train_config


@pytest.mark.parametrize(
    ("shape", "rows", "dtype", "remat"),
    [
        ({}, 8, "float32", "none"),
        ({}, 8, "float32", "mlp"),
        ({}, 8, "float32", "block"),
        ({}, 8, "bfloat16", "none"),
        ({}, 8, "bfloat16", "mlp"),
        ({}, 8, "bfloat16", "block"),
        # the loss is the most, then the weights
        ({"vocab_size": 8000, "n_layer": 1}, 2, "float32", "none"),
        ({"vocab_size": 8000, "n_layer": 1}, 2, "bfloat16", "block"),
        ({"n_embd": 96, "block_size": 16}, 1, "float32", "none"),
        ({"n_embd": 96, "block_size": 16}, 1, "bfloat16", "block"),
        # masks
        ({"dropout": 0.1}, 8, "float32", "none"),
        ({"dropout": 0.1, "block_size": 128}, 2, "bfloat16", "mlp"),
    ],
)
def test_within_15_percent_of_the_peak(
    shape: dict[str, Any], rows: int, dtype: str, remat: str
) -> None:
    config = GPTConfig(**(SMALL | shape))
    model = GPT(config)
    set_remat(model, remat)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    kind = getattr(torch, dtype)
    step = TrainingStep(
        model, optimizer, dtype=kind, grad_clip=1.0, forward=model, poll=lambda: None
    )
    idx = torch.randint(config.vocab_size, (rows, config.block_size))
    peak = measured(step, [(idx, idx)])
    assert estimate(model, optimizer, rows, kind).peak == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("share", [ALWAYS, NEVER])
def test_so_on_every_processor(share: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the products are oneDNN's, and where they are not."""
    give_onednn(monkeypatch, share)
    shape = {"vocab_size": 8000, "n_layer": 1}
    test_within_15_percent_of_the_peak(shape, 2, "float32", "none")
    test_within_15_percent_of_the_peak({}, 8, "float32", "block")
    test_muon_adapters_and_packed_documents({}, 8, "adamw", 4, ("c_attn",), False)


@pytest.mark.parametrize(
    ("shape", "rows", "optimizer", "rank", "targets", "pack"),
    [
        ({"n_embd": 96, "block_size": 16}, 1, "muon", 0, (), False),
        ({}, 8, "adamw", 4, ("c_attn",), False),
        (
            {"n_embd": 128, "block_size": 16},
            1,
            "adamw",
            16,
            ("c_attn", "c_fc", "mlp.c_proj"),
            False,
        ),
        ({"block_size": 128}, 8, "adamw", 0, (), True),
    ],
)
def test_muon_adapters_and_packed_documents(
    shape: dict[str, Any],
    rows: int,
    optimizer: str,
    rank: int,
    targets: tuple[str, ...],
    pack: bool,
) -> None:
    config = GPTConfig(**(SMALL | shape))
    model = GPT(config)
    if rank:
        add_lora(model, rank=rank, targets=targets)
    made = build_optimizer(model, tiny_train_config(Path(), optimizer=optimizer))
    forward = packed(model, 0) if pack else model
    step = TrainingStep(
        model, made, dtype=torch.float32, grad_clip=1.0, forward=forward, poll=lambda: None
    )
    idx = torch.randint(1, config.vocab_size, (rows, config.block_size))
    idx[:, ::17] = 0
    peak = measured(step, [(idx, idx)])
    expected = estimate(model, made, rows, torch.float32, pack=pack).peak
    assert expected == pytest.approx(peak, rel=0.15)


def test_the_copy_for_a_checkpoint(tmp_path: Path) -> None:
    model = GPT(GPTConfig(**SMALL))
    optimizer = build_optimizer(model, tiny_train_config(Path(), optimizer="muon"))
    gradients(model, *tiny_batch(B=2))
    optimizer.step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        write = checkpoint.staged(tmp_path, 1, model, optimizer, {})
    events = profile.profiler.kineto_results.events()
    copied = sum(e.nbytes() for e in events if e.name() == "[memory]")
    write()
    assert estimate(model, optimizer, 1, torch.float32).copy == pytest.approx(copied, rel=0.15)


def test_auto_finds_the_largest_micro_batch_that_fits_and_keeps_the_tokens_of_a_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_train_config(data, batch_size=12, grad_accum=2, steps=2, dropout=0.0)
    auto = TrainConfig.from_layers(asdict(whole), {"batch_size": "auto"})
    plain = make_trainer(whole, tmp_path / "whole")
    optimizer = plain.state.optimizer
    held = sum(p.nbytes for p in plain.model.parameters())
    memory_of_8 = estimate(plain.model, optimizer, 8, torch.float32)
    assert memory_of_8.copy == held + moment_bytes(optimizer)
    # of a process on the processor
    need = int(memory.HEAP * (memory_of_8.peak + memory_of_8.copy)) + memory.LIBRARIES
    # room for 8 of the 24 sequences, and not for 12
    monkeypatch.setattr(memory, "available", lambda device: math.ceil(need / memory.SHARE) - held)
    trainer = make_trainer(auto, tmp_path / "auto")
    assert (trainer.config.batch_size, trainer.config.grad_accum) == (8, 3)
    assert trainer.tokens_per_step == plain.tokens_per_step
    assert trainer.run().step == 2
    # a number from now on: a resumed run does not look again
    monkeypatch.setattr(memory, "available", lambda device: 0)
    kept = TrainConfig.from_layers(read_config(str(tmp_path / "auto" / "config.toml")))
    assert (kept.batch_size, kept.grad_accum, kept.auto_batch_size) == (8, 3, False)
    assert make_trainer(kept, tmp_path / "auto", resume=True).batch_size == 8
    with pytest.raises(UserError, match="--batch-size auto: one sequence takes about"):
        make_trainer(auto, tmp_path / "none")


def test_auto_on_the_command_line_and_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "auto.toml"
    file.write_text('batch_size = "auto"\nsteps = 3\n', encoding="utf-8")
    base: dict[str, Any] = {"batch_size": 6, "steps": 1}
    config = TrainConfig.from_layers(base, read_config(str(file)))
    assert (config.batch_size, config.auto_batch_size) == (6, True)
    # a number takes its place
    assert not TrainConfig.from_layers(
        base, {"batch_size": "auto"}, {"batch_size": 2}
    ).auto_batch_size
    parser = build_parser()
    assert parser.parse_args(["--batch-size", "auto"]).batch_size == "auto"
    with pytest.raises(SystemExit):
        parser.parse_args(["--batch-size", "many"])
    assert "--batch-size: expected a number or auto, got 'many'" in capsys.readouterr().err


def test_a_gpu_tries_what_the_estimate_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial finds no room for the first two sizes."""
    model = GPT(GPTConfig(**SMALL))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    tried: list[int] = []

    def fits(model: GPT, moments: int, size: int, dtype: torch.dtype) -> bool:
        tried.append(size)
        return size <= 3

    gpu = device_kind("cuda")
    monkeypatch.setattr(memory, "device_kind", lambda device: gpu)
    monkeypatch.setattr(memory, "available", lambda device: 2**40)
    monkeypatch.setattr(memory, "_fits", fits)
    said: list[str] = []
    assert memory.largest_batch(model, optimizer, 12, torch.float32, said.append) == 3
    assert tried == [12, 6, 4, 3]
    assert "batch size: 3 x 4 sequences" in said[0]
