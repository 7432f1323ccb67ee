"""A step that is not finite names its first bad module, is kept, and runs again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2 import runs
from fastgpt2.devices import rng_states
from fastgpt2.errors import UserError
from fastgpt2.model import GPT
from fastgpt2.train.__main__ import main
from fastgpt2.train.guard import BAD_STEP, KeptStep
from tests.tiny_gpt import tiny_batch, tiny_gpt
from tests.train.tiny_run import make_trainer, tiny_train_config

pytestmark = pytest.mark.usefixtures("no_picture")


def bad_step(model: GPT, **fields: Any) -> KeptStep:
    model.train()
    return KeptStep(model, [tiny_batch(), tiny_batch(seed=2)], rng_states(torch.device("cpu")), 3)


def infinite_output(model: GPT, name: str) -> None:
    model.get_submodule(name).register_forward_hook(lambda module, inputs, out: out * torch.inf)


def infinite_gradient(model: GPT, name: str) -> None:
    def hook(module: object, inputs: object, output: Tensor) -> None:
        output.register_hook(lambda grad: grad * torch.inf)  # type: ignore[no-untyped-call]

    model.get_submodule(name).register_forward_hook(hook)


@pytest.mark.parametrize(
    "name", ["transformer.wte", "transformer.h.0.attn.c_proj", "transformer.h.1.mlp", "lm_head"]
)
def test_the_first_bad_output_is_named(name: str) -> None:
    model = tiny_gpt(dropout=0.1)
    infinite_output(model, name)
    assert bad_step(model).first_bad(torch.float32) == f"the output of {name}"


@pytest.mark.parametrize("name", ["transformer.h.1.ln_2", "transformer.h.0.mlp.c_fc"])
def test_the_first_bad_gradient_is_named(name: str) -> None:
    model = tiny_gpt()
    infinite_gradient(model, name)
    assert bad_step(model).first_bad(torch.float32) == f"the gradient of the output of {name}"


def test_a_bad_weight_is_named() -> None:
    model = tiny_gpt()
    name = "transformer.h.1.attn.c_attn.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = torch.nan
    assert bad_step(model).first_bad(torch.float32) == f"the weight {name}"


def test_a_finite_step_leaves_no_trace() -> None:
    model = tiny_gpt(dropout=0.1)
    before = torch.get_rng_state()
    bad = bad_step(model)
    assert bad.first_bad(torch.float32) is None
    assert torch.get_rng_state().equal(before)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def poisoned(data: Path, run: Path, poison: Callable[[GPT], None], **fields: Any) -> str:
    trainer = make_trainer(tiny_train_config(data, steps=30, **({"eval_every": 100} | fields)), run)
    poison(trainer.model)
    with pytest.raises(UserError) as error:
        trainer.run()
    return str(error.value)


def test_a_diverged_run_keeps_its_step(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = poisoned(data, tmp_path, lambda model: infinite_output(model, "transformer.h.1.attn"))
    assert "not finite first: the output of transformer.h.1.attn; --replay" in message
    kept = tmp_path / BAD_STEP
    # the fault was not in the weights: without its hook the step is finite
    assert main(["--replay", str(kept), "--device=cpu"]) == 0
    assert "everything is finite" in capsys.readouterr().out


def test_a_sample_that_cannot_be_drawn_leaves_the_last_word_to_the_guard(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def poison(model: GPT) -> None:
        infinite_output(model, "transformer.h.1.mlp")

    message = poisoned(data, tmp_path, poison, eval_every=2, sample_tokens=3)
    assert "8 steps in a row" in message and "the output of transformer.h.1.mlp" in message
    assert "no sample: the logits are not finite" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [0, 6], ids=["no checkpoint", "a checkpoint"])
def test_the_last_checkpoint_is_mentioned_where_there_is_one(
    data: Path, tmp_path: Path, steps: int
) -> None:
    trainer = make_trainer(
        tiny_train_config(data, steps=30, eval_every=4 if steps else 100), tmp_path
    )
    passes = 0

    def hook(module: GPT, inputs: object, output: Any) -> Any:
        nonlocal passes
        passes += module.training
        return output * torch.inf if passes > steps else output

    trainer.model.transformer.h[0].register_forward_hook(hook)
    with pytest.raises(UserError) as error:
        trainer.run()
    assert ("the last checkpoint is untouched" in str(error.value)) is (steps > 0)
    assert bool(runs.saved_steps(tmp_path)) is (steps > 0)


def test_replay_finds_a_fault_of_the_weights(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def large(model: GPT) -> None:
        with torch.no_grad():
            model.get_parameter("transformer.h.1.mlp.c_fc.weight").fill_(3e38)

    message = poisoned(data, tmp_path, large)
    found = "not finite first: the output of transformer.h.1.mlp.c_fc"
    assert found in message
    assert main(["--replay", str(tmp_path / BAD_STEP), "--device=cpu"]) == 2
    assert found in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--steps=3", None])
def test_replay_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argument: str | None
) -> None:
    (tmp_path / "file").write_text("no", encoding="utf-8")
    more = [] if argument is None else [argument]
    assert main(["--replay", str(tmp_path / "file"), "--device=cpu", *more]) == 2
    expected = "not a step that was kept" if argument is None else "does not take --steps"
    assert expected in capsys.readouterr().err
