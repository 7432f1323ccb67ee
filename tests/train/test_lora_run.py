"""Runs that train adapters, and every command on what they leave."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastgpt2 import GPT, runs
from fastgpt2.convert import main as convert
from fastgpt2.errors import UserError
from fastgpt2.evaluate.__main__ import main as evaluate
from fastgpt2.generate.__main__ import main as generate
from fastgpt2.lora import merge_lora
from fastgpt2.train import checkpoint
from fastgpt2.train.__main__ import main
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.config_file import read_config
from fastgpt2.weights import load
from tests.train.tiny_run import make_trainer, measured, saved_state, tiny_train_config, train

pytestmark = pytest.mark.usefixtures("no_picture")
SHAPE: dict[str, Any] = dict(block_size=None, n_layer=None, n_head=None, n_embd=None)


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of full training, to begin with."""
    path = tmp_path_factory.mktemp("base") / "run"
    train(tiny_train_config(data, steps=2, sample_tokens=0), path)
    return path


def config(data: Path, base: Path, **fields: Any) -> TrainConfig:
    options: dict[str, Any] = dict(
        init_from=str(base), lora_rank=2, lora_target=("c_attn,mlp.c_proj",), lora_dropout=0.1
    )
    return tiny_train_config(data, **(SHAPE | options | fields))


def files(run: Path) -> dict[str, bytes]:
    """The newest checkpoint, without what the clock says."""
    return {path.name: path.read_bytes() for path in runs.latest(run).iterdir()} | {runs.STATE: b""}


@pytest.fixture(scope="module")
def finished(data: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("lora") / "run"
    flags = [f"--init-from={base}", "--lora-rank=2", "--lora-target=c_attn,c_fc", "--lora-alpha=8"]
    more = [f"--data={data}", "--steps=3", "--lr=1e-2", "--warmup-steps=0", "--batch-size=4"]
    assert main([*flags, *more, "--sample-tokens=3", "--device=cpu", f"--out={run}"]) == 0
    return run


def test_a_checkpoint_holds_the_adapters_alone(finished: Path, base: Path) -> None:
    folder = runs.latest(finished)
    assert {path.name for path in folder.iterdir()} == {
        *(runs.ADAPTER, runs.ADAPTER_CONFIG, runs.MODEL_CONFIG, runs.OPTIMIZER, runs.STATE)
    }
    adapters, moments = load_file(folder / runs.ADAPTER), load_file(folder / runs.OPTIMIZER)
    # A and B of c_attn and c_fc in both layers, and two moments of each
    assert len(adapters) == 8 and sum("exp_avg" in name for name in moments) == 16
    assert any(x.abs().max() > 0 for name, x in adapters.items() if "lora_B" in name)
    assert {runs.ADAPTER, runs.ADAPTER_CONFIG} <= set(runs.read_state(folder)["sha256"])
    # the checkpoint of the base, whatever its run does next
    assert str(runs.latest(base)) in (folder / runs.ADAPTER_CONFIG).read_text(encoding="utf-8")


def test_what_is_printed_is_what_is_stored(
    data: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--init-from={base}", "--lora-rank=4", "--lora-target", "c_attn", "c_proj", "c_fc"]
    more = [f"--data={data}", "--steps=1", "--sample-tokens=0", "--device=cpu"]
    assert main([*flags, *more, f"--out={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out
    # A and B of C = 16: 4 x (16 + 48), 4 x (16 + 16), 4 x (16 + 64), 4 x (64 + 16), in two layers
    count = 2 * 4 * (64 + 32 + 80 + 80)
    line = re.search(r"trained: (.+)k parameters .*optimizer (.+) kB, a checkpoint (.+) kB", said)
    assert line is not None, said
    trained, optimizer, checkpoint = map(float, line.groups())
    assert trained == pytest.approx(count / 1e3, rel=1e-2)
    assert optimizer == pytest.approx(8 * count / 1e3, rel=1e-2)
    folder = runs.latest(tmp_path / "run")
    tensors = load_file(folder / runs.ADAPTER) | load_file(folder / runs.OPTIMIZER)
    bytes_ = sum(x.nbytes for name, x in tensors.items() if x.dim() == 2)
    assert checkpoint == pytest.approx(bytes_ / 1e3, rel=1e-2)
    assert "LoRA: rank 4, alpha 4, on c_attn, c_proj, c_fc; a checkpoint holds the adapters" in said


def test_a_resumed_run_equals_one_never_stopped(data: Path, base: Path, tmp_path: Path) -> None:
    train(config(data, base, schedule="constant"), tmp_path / "whole")
    train(config(data, base, schedule="constant", steps=3), tmp_path / "part")
    noted = read_config(str(tmp_path / "part" / runs.RUN_CONFIG))
    train(TrainConfig(**noted | {"steps": 7}), tmp_path / "part", resume=True)
    whole, part = files(tmp_path / "whole"), files(tmp_path / "part")
    assert whole.keys() == part.keys()
    assert [name for name in whole if whole[name] != part[name]] == []
    states = [saved_state(tmp_path / name) for name in ("whole", "part")]
    assert states[0]["sha256"] == states[1]["sha256"]
    last = [measured(tmp_path / name)[-2:] for name in ("whole", "part")]
    assert last[0] == last[1]


def test_every_command_opens_it(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate([str(finished), f"--data={data}", "--device=cpu"]) == 0
    assert generate([f"--model={finished}", "--prompt=the", "--max-new-tokens=4"]) == 0
    for format in ("hf", "fastgpt2"):
        assert convert([str(finished), str(tmp_path / format), f"--to={format}"]) == 0
        assert "4 adapters of" in capsys.readouterr().out
    model = checkpoint.load_model(runs.latest(finished)).eval()
    merged = GPT.from_pretrained(tmp_path / "hf").eval()
    idx = torch.arange(16)[None]
    torch.testing.assert_close(merged.logits(idx), model.logits(idx), rtol=1e-5, atol=1e-5)
    merge_lora(model)
    for name, x in load(tmp_path / "fastgpt2").state_dict().items():
        assert torch.equal(x, model.state_dict()[name]), name


def test_it_may_be_a_beginning_with_a_shorter_context(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    first = config(data, finished, steps=1, block_size=8)
    train(first, tmp_path / "first")
    model = GPT.from_pretrained(tmp_path / "first")
    assert model.config.block_size == 8 and model.lora is None
    second = tiny_train_config(data, init_from=str(tmp_path / "first"), steps=1, **SHAPE)
    train(second, tmp_path / "second")
    assert (runs.latest(tmp_path / "second") / runs.MODEL).is_file()


def change(folder: Path) -> None:
    shutil.rmtree(folder / runs.CHECKPOINTS)


def forge(folder: Path) -> None:
    path = runs.latest(folder) / runs.MODEL
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [(change, "the weights that it adapts: .*no such"), (forge, "are not those that it adapts")],
)
def test_other_weights_than_it_began_with_are_one_line(
    data: Path,
    base: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    train(config(data, copy, steps=1), tmp_path / "run")
    damage(copy)
    capsys.readouterr()
    run = str(tmp_path / "run")
    commands: list[tuple[Callable[[list[str]], int], list[str]]] = [
        (generate, [f"--model={run}", "--prompt=a"]),
        (convert, [run, str(tmp_path / "out"), "--to=hf"]),
        (main, [f"--out={run}", "--resume", "--steps=2"]),
    ]
    for command, flags in commands:
        assert command(flags) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert re.search(message, line), line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_from": None}, "lora_rank needs init_from"),
        ({"lora_rank": 0}, "lora_rank must be 1 or more"),
        ({"lora_alpha": -1.0}, "lora_alpha must be greater than 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        ({"optimizer": "muon"}, "adapters are trained by adamw"),
        ({"lora_rank": None}, "need lora_rank"),
        ({"lora_target": ("c_attn,c_attention",)}, "no layer is called 'c_attention'"),
    ],
)
def test_what_is_refused(
    data: Path, base: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(config(data, base, **fields), tmp_path)


def test_a_resume_keeps_the_adapters(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--lora-rank=4", "--lora-target=c_fc", "--lora-alpha=1"):
        assert main([f"--out={finished}", "--resume", flag]) == 2
        assert "start a new run for that" in capsys.readouterr().err
