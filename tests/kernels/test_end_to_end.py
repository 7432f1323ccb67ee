"""The whole model on the kernels: loss and every gradient, training, compiling, decoding."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from fastgpt2.config import GPTConfig
from fastgpt2.model import GPT
from tests.kernels import budget
from tests.kernels.budget import DEVICE

TINY = GPTConfig(block_size=16, vocab_size=41, n_layer=2, n_head=2, n_embd=32)
# for many steps: every kernel call of the interpreter takes milliseconds
SMALLEST = replace(TINY, n_layer=1, vocab_size=31)
# odd sizes; the row of targets ends in ignored ones
B, T = 2, 13


def _batch(config: GPTConfig = TINY, length: int = T) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(config.vocab_size, (B, length + 1), generator=generator).to(DEVICE)
    targets = tokens[:, 1:].clone()
    targets[0, -3:] = -1
    return tokens[:, :-1], targets


def _model(config: GPTConfig = TINY, dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    model = GPT(config)
    # at initialisation, LayerNorm's weight of 1 and all biases of 0 would hide who ignores them
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(DEVICE, dtype)


def _loss_of_parameters(config: GPTConfig, *, fused: bool = True, seed: int = 0) -> budget.Op:
    """The loss as an op of the parameters, for any implementation."""
    idx, targets = _batch(config)

    def op(impl: str, **parameters: Tensor) -> Tensor:
        model = GPT(replace(config, impl=impl)).to(DEVICE)
        # dropout's seeds come from the generator, in the same order on every implementation
        torch.manual_seed(seed)
        loss: Tensor = functional_call(model, parameters, (idx, targets), {"fused_loss": fused})[1]
        return loss

    return op


@pytest.mark.parametrize("dtype", budget.dtype_grid(), ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused_loss", "logits"])
def test_loss_and_every_gradient(dtype: torch.dtype, fused: bool) -> None:
    parameters = dict(_model(dtype=dtype).named_parameters())
    # the loss is one fp32 number that comes of activations rounded to dtype: eager's may be lucky
    budget.check_op(_loss_of_parameters(TINY, fused=fused), parameters, precision=dtype)


@pytest.mark.parametrize(
    "changes",
    [{"bias": False}, {"fp32_residual": True}, {"n_head": 1, "n_embd": 40}],
    ids=["no_bias", "fp32_residual", "head_of_40"],
)
def test_other_shapes_of_model(changes: dict[str, int]) -> None:
    config = replace(TINY, **changes)  # type: ignore[arg-type]
    parameters = dict(_model(config, torch.float16).named_parameters())
    budget.check_op(_loss_of_parameters(config), parameters, precision=torch.float16)


def test_dropout_is_that_of_the_reference() -> None:
    """All three dropouts, the same masks: PyTorch's own are others, so eager is the reference."""
    config = replace(TINY, dropout=0.2)
    op, parameters = _loss_of_parameters(config, seed=5), dict(_model(config).named_parameters())
    # one set of masks is one sample of the roundings of two layers, in which eager's may be lucky
    budget.check_op(op, parameters, eager="reference", roundings=4)
    dropped, whole = (
        budget.run_with_gradients(loss, "triton", parameters, None)["y0"]
        for loss in (op, _loss_of_parameters(TINY))
    )
    assert (dropped - whole).abs() > 1e-3


def _curve(impl: str, steps: int) -> list[float]:
    """Losses of a tiny model that learns one batch."""
    model = _model(replace(SMALLEST, impl=impl))
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), DEVICE.type)
    idx, targets = _batch(SMALLEST, 9)
    losses = []
    for _ in range(steps):
        loss = model(idx, targets)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_follows_the_reference() -> None:
    triton, torch_, reference = (_curve(impl, 8) for impl in ("triton", "torch", "reference"))
    assert triton[-1] < 0.7 * triton[0]
    # what PyTorch's own kernels make of fp32's roundings in as many steps is the budget
    allowed = 2 * max(abs(a - b) for a, b in zip(torch_, reference, strict=True)) + 1e-5
    assert max(abs(a - b) for a, b in zip(triton, reference, strict=True)) <= allowed


@pytest.mark.parametrize(("backend", "lengths"), [("aot_eager", (T, T - 6)), ("inductor", (T,))])
def test_the_step_compiles_whole(backend: str, lengths: tuple[int, ...]) -> None:
    """Forward, loss and backward in one graph, equal to the uncompiled step."""
    model = _model(replace(SMALLEST, impl="triton"))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for length in lengths:
        results = []
        for forward in (model, compiled):
            model.zero_grad()
            loss = forward(*_batch(SMALLEST, length))[1]
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])  # type: ignore[union-attr]
        for plain, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_cached_decoding_writes_the_reference_text() -> None:
    prompt = _batch()[0][:, :5]
    texts = [
        _model(replace(TINY, impl=impl)).generate(prompt, 12, temperature=0.0)
        for impl in ("triton", "reference")
    ]
    assert torch.equal(*texts)


@budget.rehearsed
def test_two_hundred_steps_of_gpt2_follow_fp32(full: bool) -> None:
    """GPT-2 124M in bf16 on the kernels: the loss curve of the fp32 reference within its noise."""
    config = GPTConfig.preset("gpt2") if full else SMALLEST
    V, T, lr = (1000, 256, 6e-4) if full else (SMALLEST.vocab_size, 9, 1e-2)
    B, batches, steps = (8, 8, 200) if full else (2, 2, 10)
    generator = torch.Generator().manual_seed(3)
    corpus = torch.randint(V, (batches * B, T + 1), generator=generator).to(DEVICE)
    curves = []
    for impl, dtype in (("triton", budget.HALF), ("reference", torch.float32)):
        torch.manual_seed(0)
        model = GPT(replace(config, impl=impl)).to(DEVICE)
        optimizer = model.configure_optimizers(0.1, lr, (0.9, 0.95), DEVICE.type)
        losses = []
        for step in range(steps):
            first = step % batches * B
            batch = corpus[first : first + B]
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                loss = model(batch[:, :-1], batch[:, 1:])[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    # smoothed over one pass of the batches
    triton, reference = (curve.view(-1, batches).mean(1) for curve in curves)
    assert triton[-1] < (0.8 if full else 0.99) * triton[0]
    assert ((triton - reference).abs() <= 0.02 * reference + 0.02).all()
