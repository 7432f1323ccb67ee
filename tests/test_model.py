import copy
import math
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.kernels import use_impl
from fastgpt2.lora import add_lora
from fastgpt2.model import GPT
from tests.tiny_gpt import assert_rms_within, gradients, tiny_batch, tiny_config, tiny_gpt


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        difference = (actual[name] - expected[name]).abs()
        assert (difference <= atol + 1e-5 * expected[name].abs()).all(), name


def test_initialisation_is_gpt2s() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=2, n_embd=128, block_size=128, vocab_size=257))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            # the smallest matrix has 16,384 entries: 5 standard errors are 3 %
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name


def test_tied_head_is_one_parameter() -> None:
    model = tiny_gpt()
    assert model.lm_head.weight is model.transformer.wte.weight
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in names
    assert sum(p.numel() for p in model.parameters()) == model.get_num_params(non_embedding=False)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(ids) == len(set(ids)) == len(names)


def test_only_matrices_decay() -> None:
    optimizer = tiny_gpt().configure_optimizers(0.3, 1e-3, (0.8, 0.9), "cpu")
    decayed, other = optimizer.param_groups
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in other["params"]} == {1}
    assert (decayed["lr"], decayed["betas"], decayed["fused"]) == (1e-3, (0.8, 0.9), True)


def test_a_frozen_parameter_is_not_optimized() -> None:
    model = tiny_gpt()
    model.transformer.wpe.weight.requires_grad_(False)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert id(model.transformer.wpe.weight) not in listed


def test_deepcopy_keeps_the_tie_and_the_hooks() -> None:
    model = tiny_gpt(vocab_size=4100)
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.transformer.wte.weight
    assert twin.lm_head.weight is not model.lm_head.weight
    assert twin.state_dict()["lm_head.weight"].shape[0] == 4100
    twin.load_state_dict(model.state_dict())
    idx, _ = tiny_batch()
    assert torch.equal(twin.logits(idx), model.logits(idx))


def test_assigned_weights_stay_tied() -> None:
    source, model = tiny_gpt(0, vocab_size=4100), tiny_gpt(1, vocab_size=4100)
    model.load_state_dict(source.state_dict(), assign=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    idx, targets = tiny_batch()
    assert_same(gradients(model, idx, targets), gradients(source, idx, targets), atol=0.0)


def test_forward_in_its_four_forms() -> None:
    model = tiny_gpt()
    idx, targets = tiny_batch()
    full = model.logits(idx)
    assert full.shape == (3, 16, 61)
    last, none = model(idx)
    assert none is None
    torch.testing.assert_close(last, full[:, -1:])
    nothing, fused = model(idx, targets)
    assert nothing is None
    model.eval()
    logits, loss = model(idx, targets)
    torch.testing.assert_close(logits, full)
    torch.testing.assert_close(loss, fused)
    assert model(idx, targets, fused_loss=True)[0] is None
    assert model.train()(idx, targets, fused_loss=False)[0] is not None


@pytest.mark.parametrize("ignored", [-1, -100])
def test_ignored_targets_count_for_nothing(ignored: int) -> None:
    model = tiny_gpt().eval()
    idx = tiny_batch()[0]
    targets = torch.randint(61, (3, 16))
    targets[1] = ignored
    expected = F.cross_entropy(model.logits(idx)[[0, 2]].flatten(0, 1), targets[[0, 2]].flatten())
    torch.testing.assert_close(model(idx, targets)[1], expected)
    torch.testing.assert_close(model(idx, targets, fused_loss=True)[1], expected)


def test_nothing_but_ignored_targets_is_zero_loss_and_no_nan() -> None:
    idx, targets = tiny_batch()
    for fused in (False, True):
        result = gradients(tiny_gpt(), idx, torch.full_like(targets, -100), fused_loss=fused)
        assert all((value == 0).all() for value in result.values())


@pytest.mark.parametrize("fields", [{}, {"bias": False}, {"vocab_size": 4100}], ids=str)
def test_fused_loss_equals_the_full_loss(fields: dict[str, Any]) -> None:
    model = tiny_gpt(**fields)
    idx, targets = tiny_batch()
    fused = gradients(model, idx, targets, fused_loss=True)
    full = gradients(model, idx, targets, fused_loss=False)
    assert_same(fused, full, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_torch_equals_the_reference(bias: bool) -> None:
    """fp32: against fp64 gold, within twice what the written-out formulas make."""
    idx, targets = tiny_batch()
    model = tiny_gpt(bias=bias, impl="reference")
    results = {}
    for impl, dtype in (
        ("torch", torch.float32),
        ("reference", torch.float32),
        ("gold", torch.float64),
    ):
        config = replace(model.config, impl=impl if impl == "torch" else "reference")
        other = GPT(config).to(dtype)
        other.load_state_dict(model.state_dict())
        results[impl] = gradients(other, idx, targets)
    assert_rms_within(results["torch"], results["reference"], results["gold"])


def test_use_impl_chooses_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object, **__: object) -> Tensor:
        raise InterruptedError

    monkeypatch.setattr("fastgpt2.kernels.reference.attention", reached)
    idx, targets = tiny_batch()
    model, named = tiny_gpt(), tiny_gpt(impl="torch")
    model(idx, targets)
    with use_impl("reference"):
        with pytest.raises(InterruptedError):
            model(idx, targets)
        named(idx, targets)
    model(idx, targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype: torch.dtype) -> None:
    model = tiny_gpt()
    idx, targets = tiny_batch()
    with torch.autocast("cpu", dtype=dtype):
        assert model.hidden_states(idx).dtype == dtype
        assert model.logits(idx).dtype == dtype
        result = gradients(model, idx, targets)
    exact = gradients(model, idx, targets)
    assert {value.dtype for value in result.values()} == {torch.float32}
    for name, value in result.items():
        error = (value - exact[name]).norm() / exact[name].norm()
        # it rounds, and by no more than some roundings
        assert 0 < error < 8 * torch.finfo(dtype).eps, f"{name}: {error}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_another_dtype(dtype: torch.dtype) -> None:
    model = tiny_gpt().to(dtype)
    idx, targets = tiny_batch()
    assert model.logits(idx).dtype == dtype
    assert torch.isfinite(model(idx, targets)[1])


def test_residual_stream_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = []
    for fp32_residual in (True, False):
        model = tiny_gpt(fp32_residual=fp32_residual)
        seen: list[Tensor] = []
        model.transformer.ln_f.register_forward_hook(lambda _m, _i, out, s=seen: s.append(out[0]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.logits(tiny_batch()[0])
        streams.append(seen[0].dtype)
    assert streams == [torch.float32, torch.bfloat16]


def test_dropout_acts_in_training_only() -> None:
    idx, targets = tiny_batch()
    for field in ("attn_dropout", "embd_dropout", "resid_dropout"):
        model = GPT(replace(tiny_config(), **{field: 0.5}))  # type: ignore[arg-type]
        first, second = (model(idx, targets)[1] for _ in range(2))
        assert first != second, field
        model.eval()
        plain = GPT(tiny_config()).eval()
        plain.load_state_dict(model.state_dict())
        assert model(idx, targets)[1] == plain(idx, targets)[1], field


def largest_allocation(fused: bool) -> int:
    """Bytes that the most demanding operator of a training step allocates for itself."""
    model = tiny_gpt(n_layer=1, n_head=1, n_embd=8, vocab_size=500)
    idx, targets = tiny_batch(B=32, V=500)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(idx, targets, fused_loss=fused)[1].backward()
    return max(int(event.self_cpu_memory_usage) for event in profiler.events() or [])


def test_fused_loss_never_makes_the_full_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_bytes = 32 * 16 * 500 * 4
    # by its name, since the package has a function of the same name
    module = import_module("fastgpt2.kernels.linear_cross_entropy")
    monkeypatch.setattr(module, "TORCH_CHUNK_BYTES", 128 * 500 * 4)
    assert largest_allocation(fused=False) >= logits_bytes
    assert largest_allocation(fused=True) <= logits_bytes / 4


def test_too_many_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="GPT: 17 tokens, but block_size is 16"):
        tiny_gpt()(torch.zeros(1, 17, dtype=torch.int64))


def test_crop_block_size() -> None:
    model = tiny_gpt()
    idx = tiny_batch(T=8)[0]
    before = model.logits(idx)
    model.crop_block_size(8)
    assert (model.config.block_size, model.transformer.wpe.weight.shape) == (8, (8, 48))
    assert torch.equal(model.logits(idx), before)
    assert GPT(model.config).load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="block_size is 8"):
        model(tiny_batch(T=9)[0])
    for size in (0, 9):
        with pytest.raises(ValueError, match=rf"must be in \[1, 8\], got {size}"):
            model.crop_block_size(size)


def test_flops_and_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gpt()
    assert model.flops_per_token() == 6 * model.get_num_params() + 12 * 2 * 48 * 16
    assert model.flops_per_token(T=4) == 6 * model.get_num_params() + 12 * 2 * 48 * 4
    assert math.isnan(model.estimate_mfu(4, 1.0))
    monkeypatch.setattr("fastgpt2.model.peak_flops", lambda device: 1e9)
    expected = model.flops_per_token() * 16 * 4 / 0.5 / 1e9
    assert model.estimate_mfu(4, 0.5) == pytest.approx(expected)


@pytest.mark.parametrize("names", [("wte",), ("wpe",), ("h.0",), ("h.0", "h.1", "ln_f", "wpe")])
def test_frozen_parameters_have_no_gradient_to_compute(names: tuple[str, ...]) -> None:
    model = tiny_gpt()
    full = model.flops_per_token()
    for name in names:
        model.get_submodule(f"transformer.{name}").requires_grad_(False)
    counted = {"wte": 61 * 48, "wpe": 0}
    of_block = sum(p.numel() for p in model.transformer.h[0].parameters())
    frozen = sum(counted.get(name, 2 * 48 if name == "ln_f" else of_block) for name in names)
    assert full - model.flops_per_token() == 2 * frozen


def test_adapters_leave_two_thirds_of_the_flops() -> None:
    model = tiny_gpt(n_embd=192)
    full = model.flops_per_token()
    add_lora(model, rank=1)
    assert 0.6 * full < model.flops_per_token() < 0.8 * full


def test_overrides_that_the_weights_fix_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_gpt()
    loaded = tiny_config(), source.state_dict()
    monkeypatch.setattr("fastgpt2.weights.load_pretrained", lambda name: loaded)
    model = GPT.from_pretrained("anything", {"dropout": 0.25})
    assert model.config.dropout == 0.25
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not any(p.is_meta for p in model.parameters())
    idx = tiny_batch()[0]
    assert torch.equal(model.eval().logits(idx), source.eval().logits(idx))
    with pytest.raises(UserError, match="from_pretrained: the weights fix bias, n_layer"):
        GPT.from_pretrained("anything", {"n_layer": 3, "bias": False})


def test_a_model_without_memory_needs_no_compiler() -> None:
    # drawing numbers on the meta device imports it, which takes longer than loading the weights
    code = (
        "import sys, torch\n"
        "from tests.tiny_gpt import tiny_config\n"
        "from fastgpt2.model import GPT\n"
        "with torch.device('meta'):\n"
        "    GPT(tiny_config())\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
