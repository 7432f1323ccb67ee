"""Runs that begin with weights of another run or program."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastgpt2 import runs
from fastgpt2.errors import UserError
from fastgpt2.evaluate.__main__ import main as evaluate
from fastgpt2.opener import open_model
from fastgpt2.text import BytesTokenizer
from fastgpt2.train.__main__ import main
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.config_file import read_config
from fastgpt2.train.metrics import read_metrics
from fastgpt2.train.validation import validate
from fastgpt2.weights import load, save
from fastgpt2.weights.digest import weights_sha256
from fastgpt2.weights.formats import FORMATS
from tests.train.tiny_run import make_trainer, tiny_train_config, train

# OpenAI's format: 2 layers, 2 heads, width 128, 64 positions, 257 ids, and no tokenizer
OPENAI = Path(__file__).parents[1] / "golden" / "openai-tiny"

pytestmark = pytest.mark.usefixtures("no_picture")


def config(data: Path, **fields: Any) -> TrainConfig:
    defaults: dict[str, Any] = dict(
        data=(str(data),),
        tokenizer="bytes",
        init_from=str(OPENAI),
        batch_size=2,
        steps=12,
        lr=1e-3,
        warmup_steps=0,
        schedule="constant",
        log_every=1,
        eval_every=100,
        sample_tokens=0,
        device="cpu",
    )
    return TrainConfig(**(defaults | fields))


def test_the_loss_falls_from_that_of_the_weights(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(config(data), tmp_path)
    weights = open_model(OPENAI, tokenizer=BytesTokenizer()).load(
        torch.device("cpu"), torch.float32
    )
    scores = [
        validate(
            model,
            trainer.dataset,
            batch_size=2,
            dtype=torch.float32,
            poll=lambda: None,
        )
        for model in (trainer.model, weights)
    ]
    assert scores[0] is not None and scores[1] is not None
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-6)
    trainer.model.train()
    trainer.run()
    losses = [record["train_loss"] for record in read_metrics(tmp_path) if "train_loss" in record]
    assert losses[-1] < 0.8 * losses[0]


def test_a_run_notes_where_its_weights_came_from(data: Path, tmp_path: Path) -> None:
    train(config(data, steps=1), tmp_path / "first")
    noted = read_config(str(tmp_path / "first" / runs.RUN_CONFIG))
    assert noted["init_from"] == str(OPENAI) and len(noted["init_sha256"]) == 64
    # a run is a beginning, too, with its own tokenizer; and it resumes without it
    second = config(data, steps=2, init_from=str(tmp_path / "first"), tokenizer="auto", lr=1e-9)
    train(second, tmp_path / "second")
    first, copied = (load(tmp_path / name).state_dict() for name in ("first", "second"))
    assert all(torch.allclose(copied[name], x, atol=1e-6) for name, x in first.items())
    noted = read_config(str(tmp_path / "second" / runs.RUN_CONFIG))
    longer = TrainConfig.from_layers(noted, {"steps": 3})
    (tmp_path / "first").rename(tmp_path / "gone")
    assert train(longer, tmp_path / "second", resume=True).step == 3


def test_the_context_may_be_shorter(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(config(data, block_size=16, dropout=0.1), tmp_path)
    assert trainer.model.config.block_size == 16 and trainer.model.config.dropout == 0.1
    wpe = load(OPENAI).state_dict()["transformer.wpe.weight"]
    assert trainer.model.transformer.wpe.weight.equal(wpe[:16])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 65}, "the weights have 64 positions, block_size asks for 65"),
        ({"n_layer": 3}, "the weights have n_layer = 2, the run asks for 3"),
        ({"bias": False}, "the weights have bias = True, the run asks for False"),
        ({"tokenizer": "char"}, "no tokenizer beside it"),
        ({"init_from": "nowhere"}, "nowhere: no such file or folder"),
        ({"tokenizer": "auto", "vocab_size": 300}, "tokenizer ids has 300 ids, the model 257"),
    ],
)
def test_what_cannot_begin_a_run(
    data: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(config(data, **fields), tmp_path)


def test_the_command_leaves_the_shape_to_the_weights(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = ["--init-from", str(OPENAI), "--tokenizer", "bytes", "--data", str(data)]
    few = ["--steps", "1", "--batch-size", "2", "--sample-tokens", "0", "--device", "cpu"]
    assert main([*flags, *few, "--config", "cpu", "--out", str(out)]) == 0, capsys.readouterr().err
    noted = read_config(str(out / runs.RUN_CONFIG))
    assert (noted["n_embd"], noted["block_size"]) == (128, 64)
    assert main(["--out", str(out), "--resume", "--init-from", "other"]) == 2
    assert "init_from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "flags", "message"),
    [
        ("", ["--n-embd", "64"], "the weights have n_embd = 128, the run asks for 64"),
        ("", ["--no-bias"], "the weights have bias = True, the run asks for False"),
        ("", ["--model", "gpt2-xl"], "--model and --init-from exclude each other"),
        ('model = "gpt2-xl"', [], "--model and --init-from exclude each other"),
        ("bias = false", [], "the weights have bias = True, the run asks for False"),
        ("n_head = 4", [], "the weights have n_head = 2, the run asks for 4"),
    ],
)
def test_another_shape_than_the_weights_is_one_line(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    lines: str,
    flags: list[str],
    message: str,
) -> None:
    """Whether the configuration asks for it or the command line."""
    path = tmp_path / "mine.toml"
    path.write_text(f'steps = 1\ninit_from = "{OPENAI}"\n{lines}\n', encoding="utf-8")
    argv = ["--config", str(path), "--tokenizer=bytes", "--data", str(data), *flags]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_runs_configuration_begins_a_run_from_other_weights(data: Path, tmp_path: Path) -> None:
    """The shape that it notes was that of its own weights."""
    train(config(data, steps=1, bias=True), tmp_path / "first")
    noted = str(tmp_path / "first" / runs.RUN_CONFIG)
    flags = ["--config", noted, "--data", str(data), "--steps=1"]
    assert main([*flags, "--out", str(tmp_path / "again")]) == 0
    other = tmp_path / "other"
    small = tiny_train_config(data, steps=1, bias=False)
    train(small, other)
    out = tmp_path / "second"
    assert main([*flags, "--init-from", str(other), "--out", str(out)]) == 0
    second = read_config(str(out / runs.RUN_CONFIG))
    assert (second["n_embd"], second["bias"]) == (small.n_embd, False)


def test_the_weights_are_not_overwritten_by_the_run_that_wants_them(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(config(data, steps=1), out)
    saved = runs.latest(out)
    digest = hashlib.sha256((saved / runs.MODEL).read_bytes()).hexdigest()
    for source in (out, saved):
        flags = ["--init-from", str(source), "--data", str(data), "--out", str(out)]
        assert main([*flags, "--overwrite", "--steps", "1"]) == 2
        assert "weights" in capsys.readouterr().err
    # the optimizer's file beside the weights is not part of them
    assert weights_sha256(load(saved)) == digest


def test_the_shipped_configuration_is_nanogpts() -> None:
    shipped = TrainConfig.from_layers(read_config("finetune-shakespeare"))
    assert shipped.init_from == "gpt2" and shipped.data == ("tinyshakespeare",)
    assert (shipped.steps, shipped.batch_size, shipped.grad_accum) == (20, 1, 32)
    assert (shipped.lr, shipped.schedule, shipped.warmup_steps) == (3e-5, "constant", 0)
    # torchrun divides the 32 sequences of a step among the processes, as nanoGPT does
    assert [shipped.split(ranks) for ranks in (1, 4, 32)] == [(1, 32), (1, 8), (1, 1)]
    rest = (shipped.weight_decay, shipped.beta1, shipped.beta2, shipped.grad_clip, shipped.dropout)
    assert rest == (0.1, 0.9, 0.95, 1.0, 0.0) and shipped.val_fraction == 0.1


def test_a_resumed_run_keeps_the_gelu_of_its_weights(data: Path, tmp_path: Path) -> None:
    checkpoint = load(OPENAI)
    erf = replace(checkpoint, config=replace(checkpoint.config, gelu="erf"))
    start = save(erf, tmp_path / "start", "hf")
    settings = config(data, init_from=str(start), steps=1)
    train(settings, tmp_path / "run")
    assert load(tmp_path / "run").config.gelu == "erf"
    settings = TrainConfig(**read_config(str(tmp_path / "run" / runs.RUN_CONFIG)))
    trainer = make_trainer(settings, tmp_path / "run", resume=True)
    assert trainer.model.config.gelu == "erf"


@pytest.mark.parametrize("format", FORMATS)
def test_the_noted_digest_is_that_of_the_file_with_the_weights(
    data: Path, tmp_path: Path, format: str
) -> None:
    """Whatever lies beside it: a Trainer's files, the same weights in another format."""
    start = save(load(OPENAI), tmp_path / "start", format)
    [file] = load(start).files
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "other.safetensors"):
        (file.parent / name).write_bytes(b"anything")
    trainer = make_trainer(config(data, init_from=str(start), steps=1), tmp_path / "run")
    assert trainer.config.init_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_digest_of_weights_in_several_files_is_of_all(data: Path, tmp_path: Path) -> None:
    shape = GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "start", max_shard_size="40kB")
    files = sorted((tmp_path / "start").glob("*.safetensors"))
    assert len(files) > 1
    start = config(data, init_from=str(tmp_path / "start"), steps=1)
    content = b"".join(file.read_bytes() for file in files)
    noted = make_trainer(start, tmp_path / "run").config.init_sha256
    assert noted == hashlib.sha256(content).hexdigest()


def test_a_size_of_the_vocabulary_that_is_not_the_weights(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(data, steps=1), tmp_path / "run")
    flags = ["--init-from", str(tmp_path / "run"), "--data", str(data), "--steps=1"]
    out = ["--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert main([*flags, *out, "--vocab-size=300"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--vocab-size 300: the weights of" in line and "tokenizer bytes (257 ids)" in line
    assert not (tmp_path / "out").exists()


def test_the_same_command_resumes_when_the_weights_are_gone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(load(OPENAI), tmp_path / "start", "hf")
    flags = ["--init-from", "start", "--tokenizer=bytes", "--data", str(data), "--device=cpu"]
    few = ["--batch-size=2", "--sample-tokens=0", "--out=run"]
    assert main([*flags, *few, "--steps=1"]) == 0
    (tmp_path / "start").rename(tmp_path / "gone")
    assert main([*flags, *few, "--steps=2", "--resume"]) == 0, capsys.readouterr().err
    noted = read_config("run/config.toml")
    assert noted["init_from"] == str(tmp_path / "start") and noted["steps"] == 2
    assert main([*flags, *few, "--steps=2", "--resume", "--init-from=gone"]) == 2
    assert "init_from" in capsys.readouterr().err


def test_the_first_losses_are_those_of_evaluate(data: Path, tmp_path: Path) -> None:
    """By the commands: windows of a block and the token after it, a block apart."""
    # 65 tokens for training: one block of 64 and the token after it
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} cats\n" for i in range(8)) + "y" * 17, encoding="utf-8")
    common = [f"--data={text}", "--tokenizer=bytes", "--device=cpu"]
    few = ["--batch-size=1", "--steps=1", "--log-every=1", "--lr=0", "--sample-tokens=0"]
    flags = [f"--init-from={OPENAI}", *common, *few, "--val-fraction=0.1"]
    assert main([*flags, f"--out={tmp_path / 'run'}"]) == 0
    train_loss, val_loss = (
        next(record[name] for record in read_metrics(tmp_path / "run") if name in record)
        for name in ("train_loss", "val_loss")
    )
    windows = ["--context=65", "--stride=64", "--offline"]
    for split, expected in (("train", train_loss), ("val", val_loss)):
        out = tmp_path / split
        assert evaluate([str(OPENAI), *common, *windows, f"--split={split}", f"--out={out}"]) == 0
        [score] = json.loads((out / "evaluation.json").read_text("utf-8"))["models"].values()
        assert score["loss"] == pytest.approx(expected, rel=1e-6)
