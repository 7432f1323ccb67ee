"""A GPT is saved by one program and loaded again: padded or not, its head tied or its own."""

import copy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import (  # type: ignore[import-untyped]
    Accelerator,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_model, save_model
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.model import GPT
from fastgpt2.state_dict import head_is_tied
from fastgpt2.weights import Checkpoint, load
from fastgpt2.weights.tensors import LazyTensor
from tests.tiny_gpt import gradients, tiny_batch, tiny_config, tiny_gpt
from tests.weights.test_llmc import llmc_bytes

V, ROWS = 4100, 4224
IDX, TARGETS = tiny_batch(V=V)


def made(seed: int, pad_vocab: bool = True, tied: bool = True) -> GPT:
    model = tiny_gpt(seed, n_layer=1, vocab_size=V, pad_vocab=pad_vocab).eval()
    if not tied:
        head = torch.randn_like(model.lm_head.weight)
        head[V:] = 0.0
        model.lm_head.weight = nn.Parameter(head)
    return model


def by_safetensors(model: GPT, other: GPT, folder: Path) -> GPT:
    save_model(model, str(folder / "model.safetensors"), {"format": "pt"})
    load_model(other, str(folder / "model.safetensors"))
    return other


def by_checkpoint_in_model(model: GPT, other: GPT, folder: Path) -> GPT:
    Accelerator(cpu=True).save_model(model, str(folder))
    load_checkpoint_in_model(other, str(folder))
    return other


def by_accelerate_state(model: GPT, other: GPT, folder: Path) -> GPT:
    writer, reader = Accelerator(cpu=True), Accelerator(cpu=True)
    writer.prepare(model)
    writer.save_state(str(folder / "state"))
    prepared: GPT = reader.prepare(other)
    reader.load_state(str(folder / "state"))
    return prepared


def by_state_dict(model: GPT, other: GPT, folder: Path, **options: Any) -> GPT:
    torch.save(model.state_dict(), folder / "weights.pt")
    other.load_state_dict(torch.load(folder / "weights.pt"), **options)
    return other


def by_assignment(model: GPT, other: GPT, folder: Path) -> GPT:
    return by_state_dict(model, other, folder, assign=True, strict=False)


def by_distributed_checkpoint(model: GPT, other: GPT, folder: Path) -> GPT:
    save_shards(model.state_dict(), checkpoint_id=folder)
    state = other.state_dict()
    load_shards(state, checkpoint_id=folder)
    other.load_state_dict(state)
    return other


def by_pickle(model: GPT, other: GPT, folder: Path) -> GPT:
    torch.save(model, folder / "model.pt")
    loaded: GPT = torch.load(folder / "model.pt", weights_only=False)
    return loaded


def by_copy(model: GPT, other: GPT, folder: Path) -> GPT:
    return copy.deepcopy(model)


def by_to_empty(model: GPT, other: GPT, folder: Path) -> GPT:
    state = model.state_dict()
    other.to("meta").to_empty(device="cpu").load_state_dict(state)
    return other


Program = Callable[[GPT, GPT, Path], GPT]
PROGRAMS: list[Program] = [
    by_safetensors,
    by_checkpoint_in_model,
    by_accelerate_state,
    by_state_dict,
    by_assignment,
    by_distributed_checkpoint,
    by_pickle,
    by_copy,
    by_to_empty,
]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("pad_vocab", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_there_and_back(program: Program, pad_vocab: bool, tied: bool, tmp_path: Path) -> None:
    model = made(0, pad_vocab, tied)
    expected = gradients(model, IDX, TARGETS)
    # in the middle of training: gradients are there
    loaded = program(model, made(1, pad_vocab, tied), tmp_path)
    assert head_is_tied(loaded) is tied
    assert len(loaded.lm_head.weight) == (ROWS if pad_vocab else V)
    assert not loaded.lm_head.weight[V:].any() and not loaded.transformer.wte.weight[V:].any()
    found = gradients(loaded, IDX, TARGETS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_device_map_wants_unpadded_rows(tmp_path: Path) -> None:
    """Accelerate then puts each tensor of the file in the place of a parameter."""
    Accelerator(cpu=True).save_model(made(0), str(tmp_path))
    options: dict[str, Any] = {"checkpoint": str(tmp_path), "device_map": {"": "cpu"}}
    with init_empty_weights():
        padded, unpadded = made(1), made(1, pad_vocab=False)
    # as of any model whose head is tied, accelerate makes two parameters of it on the way
    unpadded.tie_weights()
    loaded = load_checkpoint_and_dispatch(unpadded, **options)
    assert torch.equal(loaded.logits(IDX), made(0).logits(IDX))
    with pytest.raises(ValueError, match=r"shape torch.Size\(\[4100, 48\]\)"):
        load_checkpoint_and_dispatch(padded, **options)


class HubFirst(PyTorchModelHubMixin, GPT):  # type: ignore[misc]
    """Saved by the mixin."""


class HubLast(GPT, PyTorchModelHubMixin):  # type: ignore[misc]
    """Saved by ourselves."""


@pytest.mark.parametrize("pad_vocab", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize("kind", [HubFirst, HubLast, GPT])
def test_save_pretrained_and_back(tmp_path: Path, kind: Any, pad_vocab: bool) -> None:
    model = kind(tiny_config(vocab_size=V, pad_vocab=pad_vocab)).eval()
    model.save_pretrained(tmp_path / "model")
    other = kind.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(other.logits(IDX), model.logits(IDX))
    assert other.config == model.config and head_is_tied(other)


@pytest.mark.parametrize("kind", [HubFirst, HubLast, GPT])
def test_save_pretrained_says_that_it_has_no_head_of_its_own(tmp_path: Path, kind: Any) -> None:
    model = kind(tiny_config(vocab_size=V))
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    with pytest.raises(ValueError, match=r"head is not tied|lm_head.weight differs from"):
        model.save_pretrained(tmp_path / "model")
        kind.from_pretrained(tmp_path / "model")


def test_save_pretrained_in_other_formats(tmp_path: Path) -> None:
    model = made(0)
    model.save_pretrained(tmp_path / "hf", format="hf")
    other = GPT.from_pretrained(tmp_path / "hf").eval()
    assert torch.equal(other.logits(IDX), model.logits(IDX))
    with pytest.raises(UserError, match="format 'onnx': expected one of hf"):
        model.save_pretrained(tmp_path / "x", format="onnx")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("pad_vocab", [True, False], ids=["padded", "unpadded"])
def test_nanogpt_saves_and_resumes(tmp_path: Path, pad_vocab: bool, tied: bool) -> None:
    model = made(0, pad_vocab, tied)
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    content = {
        "model": model.state_dict(),
        "model_args": {name: asdict(model.config)[name] for name in names},
        "config": {},
    }
    torch.save(content, tmp_path / "ckpt.pt")
    read = torch.load(tmp_path / "ckpt.pt")
    assert {len(read["model"][f"{name}.weight"]) for name in ("transformer.wte", "lm_head")} == {V}
    resumed = GPT(GPTConfig(**read["model_args"])).eval()
    if tied:
        resumed.load_state_dict(read["model"])
        assert torch.equal(resumed.logits(IDX), model.logits(IDX))
        opened = GPT.from_pretrained(tmp_path / "ckpt.pt", {"gelu": "tanh"}).eval()
        assert torch.equal(opened.logits(IDX), model.logits(IDX))
        return
    with pytest.raises(ValueError, match=r"lm_head.weight differs from transformer.wte.weight"):
        resumed.load_state_dict(read["model"])
    with pytest.raises(UserError, match="the head must be tied"):
        GPT.from_pretrained(tmp_path / "ckpt.pt")


def test_llmc_writes_the_parameters_of_an_unpadded_model(tmp_path: Path) -> None:
    """Its ``write_model`` asks ``named_parameters`` for as many rows as there are ids."""
    model = made(0, pad_vocab=False)
    tensors = {name: LazyTensor.of(p.detach()) for name, p in model.named_parameters()}
    path = tmp_path / "model.bin"
    path.write_bytes(llmc_bytes(Checkpoint(model.config, tensors, tmp_path), 3, ROWS))
    assert load(path).config.vocab_size == V
    opened = GPT.from_pretrained(path).eval()
    assert torch.equal(opened.logits(IDX), model.logits(IDX))


def test_weights_of_a_padded_model_fit_an_unpadded_one() -> None:
    model, other = made(0), made(1, pad_vocab=False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.logits(IDX), model.logits(IDX))
    source = made(2, pad_vocab=False)
    model.load_state_dict(source.state_dict())
    assert torch.equal(model.logits(IDX), source.logits(IDX))


def test_an_untied_head_is_its_own() -> None:
    model = made(0, tied=False)
    twin, state = copy.deepcopy(model), model.state_dict()
    for assign in (False, True):
        twin.load_state_dict(state, assign=assign)
        assert twin.lm_head.weight is not twin.transformer.wte.weight
        assert torch.equal(twin.state_dict()["lm_head.weight"], state["lm_head.weight"])
