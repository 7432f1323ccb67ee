import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.train.__main__ import _base, _configuration, build_parser
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.config_file import named_configs, read_config


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "config.toml"
    path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return str(path)


@pytest.mark.parametrize("name", named_configs())
def test_named_configs_are_valid(name: str) -> None:
    config = TrainConfig.from_layers(read_config(name))
    assert config.gpt_config(vocab_size=257).vocab_size == 257


def test_fineweb_is_one_run_on_one_gpu_and_on_eight() -> None:
    names = ("fineweb", "fineweb-8gpus")
    one, eight = (TrainConfig.from_layers(read_config(name)) for name in names)
    assert one.optimizer == "muon" and one.schedule == "wsd"
    for config, ranks in ((one, 1), (eight, 8)):
        assert config.ranks == ranks
        shape = config.gpt_config(vocab_size=50257)
        assert shape == GPTConfig.preset("gpt2")
        sequences = ranks * config.batch_size * config.grad_accum
        assert sequences * shape.block_size == 524_288
        # either plan is dealt out to the other's machine
        assert [n * batch * accum for n in (1, 8) for batch, accum in [config.split(n)]] == [
            512
        ] * 2
        assert config.steps is not None
        decay = config.wsd_decay * config.steps
        assert config.warmup_steps < config.steps - decay and config.steps * 524_288 < 2e9
    assert replace(eight, grad_accum=one.grad_accum, ranks=one.ranks) == one


def test_toml_round_trip(tmp_path: Path) -> None:
    config = TrainConfig(
        data=('a "quoted" name.txt', "back\\slash", "müll", "\x7f\x01\n\t", "🙂"),
        sample_prompt="\n\n''' # no comment\n",
        steps=3,
        minutes=0.25,
        lr=1e-30,
        weight_decay=0.1 + 0.2,
        seed=2**63 - 1,
        bias=False,
    )
    values = read_config(write(tmp_path, config.to_toml()))
    assert TrainConfig.from_layers(values) == config
    assert "epochs" not in values


def test_later_layers_win(tmp_path: Path) -> None:
    base = read_config(write(tmp_path, 'data = "one.txt"\nsteps = 5\nlr = 1\n'))
    config = TrainConfig.from_layers(base, {"steps": 7})
    assert (config.data, config.steps, config.lr) == (("one.txt",), 7, 1.0)
    assert isinstance(config.lr, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weightdecay = 1", "unknown key 'weightdecay'; did you mean 'weight_decay'?"),
        ("batchsize = 1", "unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("[train]\nlr = 1.0", "unknown key 'train'"),
        ("lr = 'high'", "lr must be a number, got 'high'"),
        ("steps = 1.5", "steps must be an integer, got 1.5"),
        ("steps = true", "steps must be an integer, got True"),
        ("lr = true", "lr must be a number, got True"),
        ("bias = 1", "bias must be true or false, got 1"),
        ("tokenizer = 3", "tokenizer must be a string, got 3"),
        ("data = [1]", "data must be a string or a list of strings, got [1]"),
        ('data = ["a", 1]', "data must be a string or a list of strings, got ['a', 1]"),
        ('data = [["a"]]', "data must be a string or a list of strings, got [['a']]"),
        ('steps = "3"', "steps must be an integer, got '3'"),
        ("steps = [3]", "steps must be an integer, got [3]"),
        ("lr = {peak = 1}", "lr must be a number, got {'peak': 1}"),
        ("lr = 2026-11-29", "lr must be a number, got datetime.date(2026, 11, 29)"),
        (f"lr = {'9' * 400}", "lr must be a number, got 999"),
        ("muon = 1", "muon must be a table, got 1"),
        ("steps = 1\nsteps = 2", "not valid TOML: Cannot overwrite a value"),
        ("'' = 1", "unknown key ''"),
        ("steps = ", "not valid TOML"),
        (b"\xff\xfe", "not UTF-8 text"),
        (f"data = {'[' * 5000}", "not valid TOML"),
        (f"steps = {'9' * 5000}", "not valid TOML: Exceeds the limit"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_missing_file_lists_the_names() -> None:
    with pytest.raises(UserError, match=r"config 'cpuu': no such file, and none of cpu, cuda"):
        read_config("cpuu")


def test_a_pipe_is_read_and_a_folder_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(
        target=pipe.write_bytes, args=(b"\xef\xbb\xbfsteps = 7\r\nlr = 1\r\n",)
    )
    writer.start()
    assert read_config(str(pipe)) == {"steps": 7, "lr": 1.0}
    writer.join()
    with pytest.raises(UserError, match=r"config '.*': not a file"):
        read_config(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": None}, "give a length of training: steps, epochs or minutes"),
        ({"steps": 0}, "steps must be greater than 0, got 0"),
        ({"epochs": float("inf")}, "epochs must be finite, got inf"),
        ({"epochs": 1e308}, "epochs must be below 2^63, got 1e+308"),
        (
            {"optimizer": "muon", "lr": 5e-324},
            "muon_lr must be a multiple of lr (4.94066e-324) that a float can hold, got 0.02",
        ),
        ({"minutes": float("nan")}, "minutes must be greater than 0, got nan"),
        ({"lr": float("nan")}, "lr must be 0 or more, got nan"),
        ({"lr": float("inf")}, "lr must be finite, got inf"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"beta2": 1.0}, "beta2 must be in [0, 1), got 1.0"),
        ({"val_fraction": 1.0}, "val_fraction must be in (0, 1), got 1.0"),
        ({"data": ()}, "data must be at least one file or name, got ()"),
        ({"warmup_steps": 10**400}, f"warmup_steps must be below 2^63, got {10**400}"),
        ({"seed": -1}, "seed must be in [0, 2^63), got -1"),
        ({"schedule": "step"}, "schedule must be one of cosine, linear, constant, wsd, got 'step'"),
        ({"data": ("a\udcff.txt",)}, "data must be UTF-8 text, got ('a\\udcff.txt',)"),
    ],
)
def test_a_bad_value_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        TrainConfig(**({"steps": 1} | fields))
    assert str(error.value) == f"config: {message}"


def test_shape_of_the_model() -> None:
    config = TrainConfig(model="gpt2-nano", n_layer=3, dropout=0.1, attn_dropout=0.0, steps=1)
    shape = config.gpt_config(vocab_size=65)
    assert (shape.n_layer, shape.n_embd, shape.vocab_size) == (3, 128, 65)
    assert (shape.attn_p, shape.resid_p) == (0.0, 0.1)


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"steps": 9}, 9),
        ({"epochs": 1.0}, 5),
        ({"epochs": 2.5}, 13),
        ({"steps": 4, "epochs": 1.0}, 4),
        ({"steps": 9, "epochs": 1.0}, 5),
        ({"minutes": 1.0}, None),
    ],
)
def test_number_of_steps(fields: dict[str, Any], steps: int | None) -> None:
    config = TrainConfig(batch_size=2, grad_accum=2, **fields)
    assert config.total_steps(blocks_per_epoch=20) == steps


def test_only_a_run_from_scratch_takes_muon_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its rates released weights would not survive; and LoRA has no use for it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for flags, optimizer in (([], "muon"), (["--init-from=gpt2"], "adamw")):
        arguments = vars(build_parser().parse_args(flags))
        assert TrainConfig.from_layers(_base(None, arguments), arguments).optimizer == optimizer
    # whoever names a configuration has what it says
    named = write(tmp_path, 'optimizer = "muon"')
    assert _base(named, {"init_from": "gpt2"})["optimizer"] == "muon"


def test_a_learning_rate_of_its_own_ends_at_the_configurations_share() -> None:
    """That of the optimizer that runs: under Muon the small configuration ends at 0."""
    base = read_config("cpu")
    for flags, share in (({}, 0.0), ({"optimizer": "adamw"}, 0.05)):
        config = _configuration(base, {"lr": 1e-5, **flags}, resume=False)
        assert config.final_lr == pytest.approx(share * 1e-5)
