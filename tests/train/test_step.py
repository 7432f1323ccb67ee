import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.errors import UserError
from fastgpt2.model import GPT
from fastgpt2.train.step import MAX_SKIPPED, Batch, TrainingStep
from tests.tiny_gpt import gradients, tiny_batch, tiny_gpt

FEED_FORWARD = "transformer.h.0.mlp.c_fc.weight"


def make_step(
    model: GPT, *, grad_clip: float = 0.0, dtype: torch.dtype = torch.float32
) -> TrainingStep:
    return TrainingStep(
        model,
        model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu"),
        dtype=dtype,
        grad_clip=grad_clip,
        forward=model,
        poll=lambda: None,
    )


def state_of(step: TrainingStep) -> list[Tensor]:
    """Copies of all weights and moments."""
    tensors = list(step.model.parameters())
    for parameter in step.model.parameters():
        tensors += step.optimizer.state[parameter].values()
    return [tensor.detach().clone() for tensor in tensors]


def poison(model: GPT, value: float) -> Any:
    """From now on one gradient is ``value`` throughout, until the handle is removed."""
    parameter: Any = model.get_parameter(FEED_FORWARD)
    return parameter.register_hook(lambda grad: torch.full_like(grad, value))


def unequal_batches() -> list[Batch]:
    """Four sequences with 16, 9, 1 and 0 targets that count."""
    idx, targets = tiny_batch(B=4)
    targets = targets.masked_fill(targets < 0, 0)
    for row, kept in enumerate((16, 9, 1, 0)):
        targets[row, kept:] = (-1, -100)[row % 2]
    return [(idx[i : i + 1], targets[i : i + 1]) for i in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("grad_clip", [0.05, 1e6])
def test_clipping_equals_pytorchs(grad_clip: float, dtype: torch.dtype) -> None:
    model = tiny_gpt()
    twin = copy.deepcopy(model)
    step = make_step(model, grad_clip=grad_clip, dtype=dtype)
    optimizer = twin.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    for seed in range(3):
        # each step starts from the same weights and moments: a rounding of one step would decide
        # the next update of a key's bias, whose gradient is rounding alone
        twin.load_state_dict(model.state_dict())
        optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
        batch = tiny_batch(seed=seed)
        result = step([batch], lr=1e-3)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = twin(*batch)[1]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), grad_clip)
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(result.grad_norm, norm)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        # AdamW is nearly blind to the gradient's scale: its first moment is not
        ours_moment = step.optimizer.state[ours]["exp_avg"]
        their_moment = optimizer.state[theirs]["exp_avg"]
        assert torch.allclose(ours_moment, their_moment, rtol=1e-4, atol=1e-8), name
        # 1 % of a step
        assert (ours - theirs).abs().max() < 1e-5, name


def test_learning_rate_is_the_one_given() -> None:
    model = tiny_gpt()
    step = make_step(model)
    before = state_of(step)
    step([tiny_batch()], lr=0.0)
    parameters = list(model.parameters())
    assert all(p.equal(b) for p, b in zip(parameters, before, strict=False))
    step([tiny_batch()], lr=1e-3)
    assert {group["lr"] for group in step.optimizer.param_groups} == {1e-3}
    assert not any(p.equal(b) for p, b in zip(parameters, before, strict=False))


def loss_and_gradients(batches: Sequence[Batch]) -> dict[str, Tensor]:
    model = tiny_gpt()
    result = make_step(model)(batches, lr=1e-3)
    # the gradients stay until the next step
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return named | {"loss": result.loss, "norm": result.grad_norm}


def test_four_times_one_is_one_times_four() -> None:
    parts = unequal_batches()
    whole = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
    apart, together = loss_and_gradients(parts), loss_and_gradients([(whole[0], whole[1])])
    assert apart.keys() == together.keys()
    for name, expected in together.items():
        torch.testing.assert_close(apart[name], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_gradient_changes_nothing(value: float, dtype: torch.dtype) -> None:
    model = tiny_gpt()
    step = make_step(model, grad_clip=1.0, dtype=dtype)
    step([tiny_batch(seed=1)], lr=1e-3)
    before, scale = state_of(step), step.scaler.get_scale()
    handle = poison(model, value)
    result = step([tiny_batch(seed=2)], lr=1e-3)
    assert not torch.isfinite(result.grad_norm)
    assert all(now.equal(then) for now, then in zip(state_of(step), before, strict=True))
    assert step.scaler.get_scale() == (scale / 2 if dtype == torch.float16 else 1.0)
    handle.remove()
    # and training goes on
    assert torch.isfinite(step([tiny_batch(seed=3)], lr=1e-3).grad_norm)
    assert not any(now.equal(then) for now, then in zip(state_of(step), before, strict=True))


def test_a_bad_run_stops_and_names_the_tensor() -> None:
    model = tiny_gpt()
    step = make_step(model)
    handle = poison(model, torch.nan)
    results = [step([tiny_batch(seed=i)], lr=1e-3) for i in range(MAX_SKIPPED)]
    for i, result in enumerate(results[:-1]):
        step.check(float(result.loss), float(result.grad_norm), i + 1)
    with pytest.raises(UserError) as error:
        step.check(float(results[-1].loss), float(results[-1].grad_norm), MAX_SKIPPED)
    message = str(error.value)
    assert f"first non-finite gradient: {FEED_FORWARD}" in message
    assert f"at step {MAX_SKIPPED}, {MAX_SKIPPED} steps in a row" in message
    assert "\n" not in message
    handle.remove()
    with torch.no_grad():
        model.get_parameter(FEED_FORWARD)[0, 0] = torch.inf
    with pytest.raises(UserError, match=f"first non-finite weight: {FEED_FORWARD}"):
        step.check(1.0, float("inf"), MAX_SKIPPED + 1)


def test_bad_steps_in_between_do_not_stop_a_run() -> None:
    step = make_step(tiny_gpt())
    for i in range(4 * MAX_SKIPPED):
        step.check(2.0 if i % MAX_SKIPPED == 0 else float("nan"), 1.0, i)


def test_it_polls_before_every_micro_batch() -> None:
    polled: list[int] = []
    step = make_step(tiny_gpt())
    step.poll = lambda: polled.append(1)
    step([tiny_batch(seed=i) for i in range(3)], lr=1e-3)
    assert len(polled) == 3


def test_fp16_scales_the_loss_so_that_small_gradients_survive() -> None:
    """Without its scale, most of this gradient is below fp16's smallest number."""
    model = tiny_gpt()
    batch = tiny_batch()
    step = make_step(model, dtype=torch.float16)
    assert step.scaler.is_enabled()
    assert step.scaler.get_scale() == 65536.0
    seen: list[float] = []
    weight: Any = model.transformer.ln_f.weight
    weight.register_hook(lambda grad: seen.append(float(grad.norm())))
    step([batch], lr=1e-3)
    exact = gradients(tiny_gpt(), *batch)["transformer.ln_f.weight"].norm()
    assert seen[0] == pytest.approx(65536.0 * float(exact), rel=0.01)
