"""What leaves PyTorch, or changes the weights' type: ONNX and torchao."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastgpt2
from tests.integrations.tiny_hf import config, randomised, tokens
from tests.tiny_gpt import tiny_batch, tiny_gpt


@pytest.fixture
def onnx_file(tmp_path: Path) -> Any:
    """Exports a model's forward, of any batch and any length up to 16."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")

    def export(model: nn.Module, *inputs: Tensor) -> Any:
        from onnx.reference import ReferenceEvaluator

        sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim("T", max=16)}
        path = tmp_path / "model.onnx"
        torch.onnx.export(
            model, inputs, path, dynamo=True, dynamic_shapes=(sizes,) * len(inputs), verbose=False
        )
        return ReferenceEvaluator(str(path))

    return export


def test_onnx_computes_the_logits_of_any_batch_and_length(onnx_file: Any) -> None:
    model = tiny_gpt(n_layer=1).eval()
    session = onnx_file(model, *tiny_batch(T=8))
    names = session.input_names
    for B, T in ((1, 1), (3, 8), (5, 16)):
        whole = tiny_batch(B=max(B, 2), T=max(T, 3))
        inputs = [x[:B, :T] for x in whole]
        found = session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
        for got, expected in zip(found, model(*inputs), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def to_int8() -> Any:
    """torchao's quantisation of the weights of linear layers, in place."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

    def quantize(model: Any) -> Any:
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        return model

    return quantize


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("vocab_size", [61, 4100])
def test_torchao_s_weights_are_used(to_int8: Any, vocab_size: int) -> None:
    idx, targets = tiny_batch()
    exact = tiny_gpt(vocab_size=vocab_size).eval().logits(idx)
    model = to_int8(tiny_gpt(vocab_size=vocab_size).eval())
    assert "lm_head is called, so the loss is computed from its logits: its weight is" in (
        model.explain()
    )
    own = error(tiny_gpt(vocab_size=vocab_size).eval().quantize().logits(idx), exact)
    assert 0.0 < error(model.logits(idx), exact) < 2 * own < 0.05
    assert model(idx, targets)[1].isfinite()
    assert model.generate(idx[:1, :4], 3, top_k=1).shape == (1, 7)


def test_torchao_s_weights_of_an_accelerated_model(to_int8: Any) -> None:
    """Its linear layers are transformers' own, except the head."""
    theirs = randomised(transformers.GPT2LMHeadModel(config()))
    exact = theirs(tokens()).logits
    ours: Any = to_int8(fastgpt2.accelerate(randomised(transformers.GPT2LMHeadModel(config()))))
    expected = to_int8(theirs)(tokens()).logits
    torch.testing.assert_close(ours(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    assert 0.0 < error(ours(tokens()).logits, exact) < 0.02
