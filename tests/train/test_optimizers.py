"""Muon on the blocks' matrices, AdamW on the rest: what each step does, and how it is kept."""

import copy
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.errors import UserError
from fastgpt2.model import GPT
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.config_file import read_config
from fastgpt2.train.freeze import freeze
from fastgpt2.train.optimizers import (
    MOMENTUM_START,
    Muon,
    MuonAndAdamW,
    build_optimizer,
    for_muon,
    orthogonalize,
    set_momentum,
)
from fastgpt2.train.step import TrainingStep
from fastgpt2.train.summary import human, optimizer_line
from tests.tiny_gpt import tiny_batch, tiny_gpt
from tests.train.tiny_run import (
    assert_same_training,
    saved_tensors,
    tiny_train_config,
    train,
)

COEFFICIENTS = (3.4445, -4.775, 2.0315)
CONFIG = tiny_train_config(Path("unused"), optimizer="muon", lr=3e-3, weight_decay=0.1)


def muon_step(
    model: GPT, *, grad_clip: float = 0.0, dtype: torch.dtype = torch.float32
) -> TrainingStep:
    return TrainingStep(
        model,
        build_optimizer(model, CONFIG),
        dtype=dtype,
        grad_clip=grad_clip,
        forward=model,
        poll=lambda: None,
    )


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_else() -> None:
    model = tiny_gpt()
    optimizer = build_optimizer(model, CONFIG)
    assert isinstance(optimizer, MuonAndAdamW)
    names = {p: name for name, p in model.named_parameters()}
    muon, *adamw = optimizer.param_groups
    taken = {names[p] for p in muon["params"]}
    assert len(taken) == 4 * model.config.n_layer
    assert all(name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") for name in taken)
    rest = [names[p] for group in adamw for p in group["params"]]
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= set(rest)
    # everything once
    assert sorted([*taken, *rest]) == sorted(names.values())
    assert not for_muon("transformer.h.0.ln_1.weight", torch.zeros(3))


def test_the_update_is_pytorchs() -> None:
    """Against ``torch.optim.Muon``, whose iteration rounds to bf16: a hundredth of an update."""
    ours, theirs = tiny_gpt(), tiny_gpt()
    matrices = [[p for n, p in m.named_parameters() if for_muon(n, p)] for m in (ours, theirs)]
    options: dict[str, Any] = dict(lr=0.02, momentum=0.9, weight_decay=0.1)
    optimizers: tuple[Any, ...] = (
        Muon(matrices[0], **options),
        torch.optim.Muon(matrices[1], **options),
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for a, b in zip(*matrices, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(*matrices, strict=True):
        # an update has a norm of about sqrt(rank) times 0.02 and the adjustment
        size = 3 * 0.02 * max(1.0, a.shape[0] / a.shape[1]) ** 0.5 * min(a.shape) ** 0.5
        assert (a - b).norm() < 0.02 * size, a.shape
        moments = (o.state[p]["momentum_buffer"] for o, p in zip(optimizers, (a, b), strict=True))
        torch.testing.assert_close(*moments, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("columns", [8, 24, 32])
def test_orthogonalize_keeps_the_directions_and_evens_their_sizes(columns: int) -> None:
    x = torch.randn(3, 8, columns, generator=torch.Generator().manual_seed(1))
    out = orthogonalize(x, COEFFICIENTS, 5)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    inside = left.mT @ out @ right.mT
    sizes = inside.diagonal(dim1=1, dim2=2)
    assert 0.6 < sizes.min() and sizes.max() < 1.3
    assert (inside - torch.diag_embed(sizes)).abs().max() < 1e-4


def plain_iteration(x: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    x = x / x.norm(dim=(1, 2), keepdim=True)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_gram_form_is_the_iteration_itself(steps: int) -> None:
    x = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(2))
    expected = plain_iteration(x.double(), steps)
    torch.testing.assert_close(
        orthogonalize(x, COEFFICIENTS, steps).double(), expected, rtol=0, atol=1e-5
    )


def test_both_learning_rates_follow_one_schedule() -> None:
    step = muon_step(tiny_gpt())
    step([tiny_batch()], lr=1.5e-3)
    muon, *adamw = step.optimizer.param_groups
    assert muon["lr"] == pytest.approx(CONFIG.muon_lr / 2)
    assert all(group["lr"] == 1.5e-3 for group in adamw)


def test_momentum_warms_up() -> None:
    optimizer = build_optimizer(tiny_gpt(), CONFIG)
    seen = []
    for step in (0, 150, 300, 900):
        set_momentum(optimizer, step, momentum=0.95, warmup_steps=300)
        seen.append(optimizer.param_groups[0]["momentum"])
    assert seen == pytest.approx([MOMENTUM_START, 0.9, 0.95, 0.95])
    assert "momentum" not in optimizer.param_groups[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_changes_nothing(bad: float) -> None:
    model = tiny_gpt()
    step = muon_step(model, grad_clip=1.0)
    step([tiny_batch()], lr=1e-3)
    parameters = list(model.parameters())
    before = [
        t.clone() for p in parameters for t in (p.detach(), *step.optimizer.state[p].values())
    ]
    weight = model.get_parameter("transformer.h.0.mlp.c_fc.weight")
    handle = weight.register_hook(lambda grad: torch.full_like(grad, bad))  # type: ignore[no-untyped-call]
    step([tiny_batch()], lr=1e-3)
    handle.remove()
    after = [t for p in parameters for t in (p.detach(), *step.optimizer.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    step([tiny_batch()], lr=1e-3)
    assert not torch.equal(weight, before[1])


def test_clipping_divides_what_enters_the_momentum() -> None:
    model = tiny_gpt()
    free, clipped = muon_step(copy.deepcopy(model)), muon_step(model, grad_clip=1e-3)
    norm = free([tiny_batch()], lr=1e-3).grad_norm
    clipped([tiny_batch()], lr=1e-3)
    name = "transformer.h.0.attn.c_attn.weight"
    a, b = (
        s.optimizer.state[s.model.get_parameter(name)]["momentum_buffer"] for s in (free, clipped)
    )
    torch.testing.assert_close(a * (1e-3 / norm), b, rtol=1e-5, atol=0)


def test_fp16_trains_with_the_scaler() -> None:
    step = muon_step(tiny_gpt(), dtype=torch.float16)
    losses = [step([tiny_batch()], lr=3e-3).loss.item() for _ in range(12)]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.usefixtures("no_picture")
def test_a_resumed_run_equals_one_never_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_train_config(data, optimizer="muon", muon_warmup_steps=5)
    train(config, tmp_path / "whole")
    take_step, calls = TrainingStep.__call__, 0

    def stopped_at_the_fourth(self: TrainingStep, batches: Any, lr: float) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            signal.raise_signal(signal.SIGTERM)
        return take_step(self, batches, lr)

    monkeypatch.setattr(TrainingStep, "__call__", stopped_at_the_fourth)
    run = tmp_path / "resumed"
    assert train(config, run).step == 3
    assert any(name.startswith("momentum_buffer.") for name in saved_tensors(run))
    train(config, run, resume=True)
    assert_same_training(run, tmp_path / "whole")


def test_the_table_muon_of_a_configuration_holds_for_muon_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("steps = 9\nlr = 1e-3\n[muon]\nlr = 4e-3\nsteps = 3\n", encoding="utf-8")
    base = read_config(str(path))
    assert TrainConfig.from_layers(base).lr == 1e-3
    config = TrainConfig.from_layers(base, {"optimizer": "muon", "steps": 5})
    assert (config.lr, config.steps) == (4e-3, 5)
    path.write_text("steps = 9\n[muon]\nlearning = 4e-3\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"mine.toml, \[muon\]: unknown key 'learning'"):
        read_config(str(path))


def test_muon_without_a_learning_rate_for_the_rest_is_refused() -> None:
    with pytest.raises(UserError, match="lr must be greater than 0 with the optimizer muon"):
        TrainConfig(steps=1, lr=0.0, optimizer="muon")


def test_the_groups_are_shown_with_their_rates() -> None:
    model = tiny_gpt()
    line = optimizer_line(build_optimizer(model, CONFIG))
    matrices = sum(p.numel() for name, p in model.named_parameters() if for_muon(name, p))
    assert line.startswith(f"optimizer: muon on {human(matrices)} parameters, lr 0.02, weight ")
    assert line.count("adamw on ") == 2 and line.count("lr 0.003, weight decay 0") == 2
    # without a group that is empty
    freeze(model, ("*.bias", "*ln_*"))
    line = optimizer_line(build_optimizer(model, CONFIG))
    assert line.count("adamw on ") == 1 and line.endswith("lr 0.003, weight decay 0.1")
