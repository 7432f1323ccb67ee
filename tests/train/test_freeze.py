"""Parameters that ``--freeze`` keeps as they are."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt2 import runs
from fastgpt2.errors import UserError
from fastgpt2.train.__main__ import main
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.config_file import read_config
from fastgpt2.train.freeze import freeze
from fastgpt2.train.memory import estimate
from fastgpt2.train.optimizers import build_optimizer, moment_bytes
from fastgpt2.train.step import TrainingStep
from fastgpt2.train.summary import model_lines, trained_parameters
from fastgpt2.weights import load
from tests.tiny_gpt import gradients, tiny_batch, tiny_gpt
from tests.train.tiny_run import (
    make_trainer,
    saved_tensors,
    tiny_train_config,
    train,
)

pytestmark = pytest.mark.usefixtures("no_picture")
HEAD_LINE = "lm_head.weight is transformer.wte.weight, so the head is frozen with the embedding"


def frozen_names(*patterns: str) -> set[str]:
    model = tiny_gpt()
    freeze(model, patterns)
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def test_patterns_are_for_names_of_parameters_and_of_modules() -> None:
    every = {name for name, _ in tiny_gpt().named_parameters()}
    first = {name for name in every if ".h.0." in name}
    assert frozen_names("transformer.h.0.*") == frozen_names("transformer.h.0") == first
    assert frozen_names("*.bias") == {name for name in every if name.endswith("bias")}
    assert frozen_names("transformer.h.?.ln_[12].weight", "transformer.wpe") == {
        *(f"transformer.h.{i}.ln_{j}.weight" for i in (0, 1) for j in (1, 2)),
        "transformer.wpe.weight",
    }
    # the head is the embedding, by either name
    assert frozen_names("lm_head") == frozen_names("*.wte.weight") == {"transformer.wte.weight"}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("transformer.h.0", "h.9.*"), "--freeze 'h.9.*': no parameter has such a name"),
        (("TRANSFORMER.*",), "no parameter has such a name"),
        (("",), "no parameter has such a name"),
        (("*",), "--freeze *: nothing is left to train"),
        (("transformer.w?e", "transformer.h", "*ln_f*"), "nothing is left to train"),
    ],
)
def test_what_cannot_be_frozen(patterns: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as error:
        freeze(tiny_gpt(), patterns)
    assert message in str(error.value) and "\n" not in str(error.value)


PARTS = ("transformer.wte", "transformer.wpe", "transformer.h.0", "*.mlp", "*.bias", "*ln*")


@pytest.mark.parametrize("patterns", [*itertools.combinations(PARTS, 1), PARTS[:3], PARTS[2:]])
def test_what_is_left_has_the_gradients_that_it_had(patterns: tuple[str, ...]) -> None:
    whole, model = tiny_gpt(), tiny_gpt()
    freeze(model, patterns)
    expected, found = (gradients(m, *tiny_batch()) for m in (whole, model))
    left = {name for name, p in model.named_parameters() if p.requires_grad} | {"loss"}
    assert set(found) == left
    for name in left:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_frozen_have_no_state_no_decay_and_no_part_in_the_norm(optimizer: str) -> None:
    model = tiny_gpt()
    config = tiny_train_config(
        Path("unused"), optimizer=optimizer, weight_decay=0.5, muon_weight_decay=0.5
    )
    freeze(model, ("transformer.h.0", "transformer.wte"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = TrainingStep(
        model,
        build_optimizer(model, config),
        dtype=torch.float32,
        grad_clip=1e-3,
        forward=model,
        poll=lambda: None,
    )
    norm = step([tiny_batch()], lr=1e-2).grad_norm
    whole = gradients(tiny_gpt(), *tiny_batch())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = torch.cat([whole[name].flatten() for name in sorted(trained)]).norm()
    torch.testing.assert_close(norm, expected)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is (not p.requires_grad), name
        assert (p in step.optimizer.state) is p.requires_grad
    # two moments for AdamW, one for Muon, and none of a frozen parameter
    moments = [t for s in step.optimizer.state.values() for t in s.values() if t.dim()]
    assert moment_bytes(step.optimizer) == sum(t.nbytes for t in moments)
    assert trained_parameters(model) == sum(before[name].numel() for name in trained)
    memory = estimate(model, step.optimizer, 1, torch.float32)
    lines = model_lines(model, step.optimizer, memory, torch.float32)
    assert any(line.startswith("trained: ") and "optimizer" in line for line in lines)


def test_the_padding_of_a_vocabulary_is_not_counted() -> None:
    model = tiny_gpt(vocab_size=4097)
    assert trained_parameters(model) == model.get_num_params(non_embedding=False)
    freeze(model, ("*wte*",))
    whole = model.get_num_params(non_embedding=False)
    assert trained_parameters(model) == whole - 4097 * model.config.n_embd


def test_a_resumed_run_keeps_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = dict(freeze=("transformer.h.0", "lm_head"), steps=6)
    train(tiny_train_config(data, **settings), tmp_path / "whole")
    train(tiny_train_config(data, **settings | {"steps": 3}, lr=1e-2), tmp_path / "part")
    stored = saved_tensors(tmp_path / "whole")
    assert not [name for name in stored if "exp_avg" in name and (".h.0." in name or "wte" in name)]
    noted = read_config(str(tmp_path / "part" / runs.RUN_CONFIG))
    assert noted["freeze"] == settings["freeze"]
    trainer = make_trainer(TrainConfig(**noted | {"steps": 6}), tmp_path / "part", resume=True)
    assert any(HEAD_LINE in line for line in trainer.frozen)
    trainer.run()
    before, after = (
        load(runs.step_folder(tmp_path / "part", step)).state_dict() for step in (3, 6)
    )
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if ".h.0." in name or "wte" in name}
    flags = ["--out", str(tmp_path / "part"), "--resume", "--freeze", "transformer.wpe"]
    assert main(flags) == 2
    assert "freeze" in capsys.readouterr().err


def test_the_flag_may_be_repeated(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ["--model=gpt2-nano", "--n-layer=1", "--n-embd=8", "--n-head=1", "--block-size=16"]
    flags = ["--data", str(data), "--tokenizer=bytes", "--steps=1", "--sample-tokens=0", *shape]
    frozen = ["--freeze", "*wpe*", "*ln_f*", "--freeze", "transformer.h.0"]
    assert main([*flags, *frozen, "--device=cpu", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "frozen: 15 of 16 tensors, by *wpe* *ln_f* transformer.h.0" in said
    # 257 ids of width 8
    assert "trained: 2.06k parameters" in said
    assert main([*flags, "--freeze", "nothing", "--out", str(tmp_path / "other")]) == 2
    assert "--freeze 'nothing'" in capsys.readouterr().err
