"""torch.compile of the training step: one graph, and no second compilation."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from fastgpt2.compiler import compiler_obstacle
from tests.tiny_gpt import gradients, tiny_batch, tiny_gpt


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_one_compilation_for_a_whole_run(dropout: float) -> None:
    model = tiny_gpt(dropout=dropout)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    model.train()
    for step in range(5):
        compiled(*tiny_batch(seed=step))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            # an evaluation and a sample in between, as the training loop has them
            model.eval()
            with torch.no_grad():
                model(*tiny_batch(), fused_loss=True)
            model.generate(tiny_batch(T=4)[0], 2)
            model.train()
        assert backend.frame_count == 1, f"compiled again at step {step}"
    assert not counters["graph_break"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gradients_are_the_eager_ones(dtype: torch.dtype) -> None:
    model = tiny_gpt()
    idx, targets = tiny_batch()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        eager = gradients(model, idx, targets)
        model.zero_grad()
        loss = compiled(idx, targets)[1]
    loss.backward()
    assert loss == eager.pop("loss")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, eager[name], atol=1e-6, rtol=1e-5)


def test_evaluation_compiles_too() -> None:
    model = tiny_gpt().eval()
    idx, targets = tiny_batch()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits, loss = compiled(idx, targets)
    expected_logits, expected_loss = model(idx, targets)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(loss, expected_loss)
    assert compiled(idx)[0].shape == (3, 1, 61)


@pytest.mark.skipif(
    compiler_obstacle(torch.device("cpu")) is not None, reason="needs a C++ compiler"
)
def test_inductor_trains_like_eager() -> None:
    """With the compiler that users get: slow to compile, so once, and as small as can be."""
    losses = []
    for compile in (False, True):
        model = tiny_gpt(n_layer=1, n_head=1, n_embd=8)
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
        forward: Any = torch.compile(model, fullgraph=True, dynamic=False) if compile else model
        run = []
        for step in range(3):
            loss = forward(*tiny_batch(seed=step))[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(loss.item())
        losses.append(run)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
