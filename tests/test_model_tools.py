"""PyTorch's and others' tools on a GPT: what they change counts, and what they record is right."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import (  # type: ignore[import-untyped]
    cpu_offload,
)
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from fastgpt2.layers import MLP, CausalSelfAttention
from tests.tiny_gpt import gradients, tiny_batch, tiny_gpt

LAYERS = (
    "transformer.wte",
    "transformer.wpe",
    "transformer.h.0.ln_1",
    "transformer.h.0.attn",
    "transformer.h.0.attn.c_attn",
    "transformer.h.0.attn.c_proj",
    "transformer.h.1.ln_2",
    "transformer.h.1.mlp",
    "transformer.h.1.mlp.c_fc",
    "transformer.h.1.mlp.c_proj",
    "transformer.ln_f",
    "lm_head",
)
WITH_WEIGHTS = [name for name in LAYERS if not name.endswith((".attn", ".mlp"))]


class Zeros(nn.Module):
    """A parametrization that nobody can overlook."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_hook_fires_and_changes_what_follows(name: str, training: bool) -> None:
    model, (idx, targets) = tiny_gpt().train(training), tiny_batch()
    before = model(idx, targets)[1]
    assert f"{name} is called" not in model.explain()
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _i, out: out * 1.5)
    assert not torch.equal(model(idx, targets)[1], before)
    assert f"{name} is called" in model.explain()
    handle.remove()
    assert torch.equal(model(idx, targets)[1], before)
    assert "every module is plain" in model.explain()


@pytest.mark.parametrize("kind", [nn.Embedding, nn.LayerNorm, nn.Linear, CausalSelfAttention, MLP])
def test_a_forward_replaced_in_the_class_counts(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tools that count or patch operations do, for all instances at once."""
    model, (idx, targets) = tiny_gpt(), tiny_batch()
    before, forward = model(idx, targets)[1], kind.forward

    def halved(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        out = forward(self, *arguments, **named)
        return (out[0] * 0.5, *out[1:]) if isinstance(out, tuple) else out * 0.5

    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", halved)
        assert not torch.allclose(model(idx, targets)[1], before, rtol=1e-3)
        assert f"the forward of {kind.__name__} has been replaced" in model.explain()
    assert torch.equal(model(idx, targets)[1], before)


def test_called_modules_compute_what_the_kernels_do() -> None:
    idx, targets = tiny_batch()
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_gpt()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            expected = gradients(model, idx, targets)
            for module in model.modules():
                module.register_forward_hook(lambda _m, _i, out: None)
            found = gradients(model, idx, targets)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        for name, value in expected.items():
            error = float((found[name] - value).norm() / value.norm())
            assert error < tolerance, (name, error)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_a_parametrization_counts(name: str) -> None:
    model, (idx, targets) = tiny_gpt(), tiny_batch()
    before = model(idx, targets)[1]
    parametrize.register_parametrization(model.get_submodule(name), "weight", Zeros())
    loss = model(idx, targets)[1]
    assert not torch.equal(loss, before)
    loss.backward()
    assert model.state_dict()


def test_weight_norm_and_pruning_train() -> None:
    model: Any = tiny_gpt()
    idx, targets = tiny_batch()
    nn.utils.weight_norm(model.transformer.h[0].mlp.c_fc)
    prune.l1_unstructured(model.transformer.h[1].mlp.c_proj, "weight", 0.5)  # type: ignore[no-untyped-call]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(3):
        loss = model(idx, targets)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] > losses[1] > losses[2]


def test_lora_on_every_layer_gets_gradients() -> None:
    model, (idx, targets) = tiny_gpt(), tiny_batch()
    names = ["c_attn", "c_fc", "c_proj", "wte", "wpe", "lm_head"]
    inject_adapter_in_model(LoraConfig(target_modules=names, r=2), model)
    model(idx, targets)[1].backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * (2 * 4 + 3) and all(p.grad is not None for p in trained)


def test_offloaded_weights_are_fetched() -> None:
    model, (idx, targets) = tiny_gpt().eval(), tiny_batch()
    expected = model.generate(idx[:, :4], 3, top_k=1), model(idx, targets)[1]
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert "lm_head is called, so the loss is computed from its logits: it has hooks" in (
        model.explain()
    )
    assert torch.equal(model.generate(idx[:, :4], 3, top_k=1), expected[0])
    assert model.log_probs(idx).isfinite().all()
    torch.testing.assert_close(model(idx, targets)[1], expected[1])


def test_dynamic_quantisation_quantises() -> None:
    model, (idx, _) = tiny_gpt().eval(), tiny_batch()
    quantize: Any = torch.ao.quantization.quantize_dynamic
    quantised = quantize(model, {nn.Linear}, dtype=torch.qint8)
    kinds = [type(module).__name__ for module in quantised.modules()]
    assert kinds.count("Linear") == 2 * 4 + 1 and not any(
        type(m) is nn.Linear for m in quantised.modules()
    )
    assert not torch.equal(quantised.logits(idx), model.logits(idx))


def test_a_module_replaced_by_another() -> None:
    model: Any = tiny_gpt()
    idx, targets = tiny_batch()
    model.transformer.h[0].mlp = nn.Sequential(nn.Linear(48, 9), nn.GELU(), nn.Linear(9, 48))
    model.transformer.h[1].ln_2 = nn.LayerNorm(48, elementwise_affine=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(idx, targets)[1].backward()
    assert "transformer.h.0.mlp is called: it is a Sequential" in model.explain()


def test_exported_and_traced_programs_compute_the_logits(tmp_path: Path) -> None:
    model, (idx, targets) = tiny_gpt().eval(), tiny_batch(T=8)
    program = torch.export.export(model, (idx, targets))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    logits, loss = model(idx, targets)
    torch.testing.assert_close(loaded.module()(idx, targets), (logits, loss))
    assert "fastgpt2" not in str(program.run_decompositions().graph)
    # a block of autocast, even of one that is off, is an operator of its own
    assert "autocast" not in str(program.graph)
    buffer = io.BytesIO()
    model.forward = model.logits  # type: ignore[assignment]
    torch.jit.save(torch.jit.trace(model, idx), buffer)  # type: ignore[no-untyped-call]
    buffer.seek(0)
    other = tiny_batch(B=5, T=11, seed=2)[0]
    traced = torch.jit.load(buffer)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(other), model.logits(other))


def test_an_exported_program_takes_any_batch_and_length() -> None:
    """Also one row of one token: a size of 1 is a constant where a branch asks for it."""
    model, (idx, targets) = tiny_gpt(n_layer=1).eval(), tiny_batch(T=8)
    sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim("T", max=16)}
    program = torch.export.export(model, (idx, targets), dynamic_shapes=(sizes, sizes))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for B, T in ((1, 1), (5, 16), (70, 2)):
        idx, targets = torch.randint(61, (2, B, T))
        torch.testing.assert_close(loaded(idx, targets), model(idx, targets))


def test_meta_device() -> None:
    with torch.device("meta"):
        model = tiny_gpt()
    idx = torch.zeros(2, 8, dtype=torch.long, device="meta")
    assert model(idx)[0].is_meta
    model(idx, idx)[1].backward()
    model.to_empty(device="cpu")
    assert model.lm_head.weight is model.transformer.wte.weight


def test_ids_without_a_batch_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"GPT: idx must be \(B, T\), got shape \(2,\)"):
        tiny_gpt()(torch.tensor([1, 2]))
