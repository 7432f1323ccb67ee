"""Weights of 8 bits: what is kept, what it costs, and that files hold all of it."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from fastgpt2.config import GPT2_VOCAB, GPTConfig
from fastgpt2.convert import main
from fastgpt2.errors import UserError
from fastgpt2.generate.slots import Slots
from fastgpt2.model import GPT
from fastgpt2.quantize import (
    QuantizedEmbedding,
    QuantizedLinear,
    dequantize_rows,
    quantize_rows,
)
from fastgpt2.runs import MODEL
from fastgpt2.weights import load, save
from fastgpt2.weights.safetensors_file import read_safetensors, write_safetensors
from fastgpt2.weights.tensors import LazyTensor
from tests.tiny_gpt import tiny_gpt
from tests.weights.conftest import random_checkpoint


def dequantized(model: GPT) -> GPT:
    """A plain model of the weights that an int8 model stands for."""
    plain = tiny_gpt()
    state = model.state_dict()
    scales = {name: state.pop(name) for name in list(state) if name.endswith(".scales")}
    for name, values in scales.items():
        weight = name.removesuffix("scales") + "weight"
        state[weight] = dequantize_rows(state[weight], values[: len(state[weight])])
    plain.load_state_dict(state)
    return plain.eval()


def test_rows_are_within_half_a_step_and_survive_a_second_time() -> None:
    weight = torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-38, 30, 64)[:, None]
    weight[3] = 0
    # too small for a scale of its own
    weight[4] = 1e-45
    integers, scales = quantize_rows(weight)
    back = dequantize_rows(integers, scales)
    assert integers.abs().max() == 127
    assert torch.all((back - weight).abs() <= 0.5001 * scales[:, None])
    again = quantize_rows(back)
    assert torch.equal(again[0], integers)
    full = [i for i in range(64) if i not in (3, 4) and weight[i].abs().max() > 1e-30]
    assert torch.equal(again[1][full], scales[full])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_weights_it_stands_for(dtype: torch.dtype) -> None:
    model = tiny_gpt().to(dtype).eval()
    assert model.quantize("int8") is model
    idx = torch.randint(61, (3, 9))
    expected = dequantized(model).logits(idx)
    logits = model.logits(idx)
    assert logits.dtype == dtype
    tolerance = 2e-5 if dtype == torch.float32 else 0.05
    error = (logits.float() - expected).norm() / expected.norm()
    assert error < tolerance


def test_every_matrix_is_int8_and_shared_once() -> None:
    model = tiny_gpt()
    count = model.get_num_params()
    model.quantize()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert isinstance(model.get_submodule("transformer.wte"), QuantizedEmbedding)
    kinds = {name: p.dtype for name, p in model.named_parameters() if p.dim() == 2}
    assert kinds.pop("transformer.wpe.weight") == torch.float32
    assert len(kinds) == 9
    assert set(kinds.values()) == {torch.int8}
    assert model.get_num_params() == count
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 9


def test_cached_logits_equal_uncached_ones() -> None:
    model = tiny_gpt().eval().quantize()
    idx = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(3))
    slots, steps = Slots(model, 2, 12), []
    for T in range(5, 13):
        with torch.no_grad():
            steps.append(slots.feed(0, idx[:, slots.lengths[0] : T].tolist()))
    full = model.logits(idx)[:, 4:]
    torch.testing.assert_close(torch.stack(steps, dim=1), full, rtol=1e-4, atol=1e-5)


def test_scales_stay_in_fp32() -> None:
    model = tiny_gpt().quantize()
    scales = model.get_buffer("lm_head.scales").clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.get_buffer("lm_head.scales"), scales)
    assert model.logits(torch.zeros(1, 2, dtype=torch.int64)).dtype == torch.bfloat16


def test_state_dict_there_and_back() -> None:
    model = tiny_gpt().eval().quantize()
    other = tiny_gpt(seed=5).eval().quantize()
    other.load_state_dict(model.state_dict())
    idx = torch.randint(61, (2, 7))
    assert torch.equal(other.logits(idx), model.logits(idx))


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="kind must be one of int8, got 'int3'"):
        tiny_gpt().quantize("int3")
    with pytest.raises(UserError, match="is quantized already"):
        tiny_gpt().quantize().quantize()
    hooked = tiny_gpt()
    hooked.get_submodule("transformer.h.1.mlp.c_fc").register_forward_hook(lambda *_: None)
    before = copy.deepcopy(hooked.state_dict())
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc cannot be quantized: it has hooks"):
        hooked.quantize()
    # nothing was replaced on the way
    assert all(torch.equal(before[name], value) for name, value in hooked.state_dict().items())
    broken = tiny_gpt()
    nn.init.constant_(broken.get_parameter("transformer.h.0.attn.c_proj.weight"), float("nan"))
    with pytest.raises(UserError, match="NaN or infinite"):
        broken.quantize()


CONFIG = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=48)


def test_convert_writes_int8_and_the_opener_reads_it(tmp_path: Path) -> None:
    source = save(random_checkpoint(CONFIG), tmp_path / "source", "fastgpt2")
    target = tmp_path / "int8"
    argv = [str(source), str(target), "--to", "fastgpt2"]
    assert main([*argv, "--quantize", "int8"]) == 0
    (path,) = target.rglob(MODEL)
    (original,) = source.rglob(MODEL)
    assert path.stat().st_size < 0.45 * original.stat().st_size
    stored = read_safetensors(path)
    assert stored["transformer.wte.weight"].dtype == torch.int8
    assert stored["transformer.wte.scales"].shape == (65,)
    model = GPT.from_pretrained(str(target))
    idx = torch.randint(65, (2, 7))
    expected = GPT.from_pretrained(str(source)).quantize().logits(idx)
    assert torch.equal(model.logits(idx), expected)
    # a second time, bit for bit; and as plain weights for other programs
    assert main([str(target), str(tmp_path / "again"), "--to", "fastgpt2"]) == 0
    (again,) = (tmp_path / "again").rglob(MODEL)
    assert again.read_bytes() == path.read_bytes()
    assert main([str(target), str(tmp_path / "hf"), "--to", "hf"]) == 0
    plain = GPT.from_pretrained(str(tmp_path / "hf")).logits(idx)
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vocab_size", [61, GPT2_VOCAB])
def test_a_quantized_model_is_saved_and_loaded(tmp_path: Path, vocab_size: int) -> None:
    """Its vocabulary may be padded."""
    model = tiny_gpt(vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=8).eval().quantize()
    idx = torch.randint(61, (2, 7))
    for format in ("fastgpt2", "hf"):
        model.save_pretrained(tmp_path / format, format=format)
        other = GPT.from_pretrained(tmp_path / format)
        is_quantized = other.lm_head.weight.dtype == torch.int8
        assert is_quantized == (format == "fastgpt2")
        if is_quantized:
            assert torch.equal(other.logits(idx), model.logits(idx))
        else:
            torch.testing.assert_close(other.logits(idx), model.logits(idx), rtol=1e-4, atol=1e-4)


def test_damaged_quantized_files_are_refused(tmp_path: Path) -> None:
    folder = save(random_checkpoint(CONFIG), tmp_path / "int8", "fastgpt2", quantize="int8")
    (path,) = folder.rglob(MODEL)
    good = {name: LazyTensor.of(t.read().clone()) for name, t in read_safetensors(path).items()}
    name = "transformer.h.0.attn.c_attn.scales"
    without = {key: value for key, value in good.items() if key != name}
    for tensors, message in (
        (without, "its scales are missing"),
        (good | {name: LazyTensor.zeros((3,), torch.float32)}, "its scales \\(3,\\)"),
        (good | {name: LazyTensor.zeros((144,), torch.float16)}, "must be float32"),
    ):
        write_safetensors(path, tensors)
        with pytest.raises(UserError, match=message):
            load(folder)


def test_other_formats_refuse(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only the format fastgpt2 can be quantized"):
        save(random_checkpoint(CONFIG), tmp_path / "hf", "hf", quantize="int8")
