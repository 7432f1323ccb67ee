"""Adapters in PEFT's format, held against PEFT on Hugging Face's class."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastgpt2 import GPT, UserError, add_lora, load_adapter, save_adapter
from fastgpt2.convert import main as convert
from fastgpt2.lora import adapters
from fastgpt2.weights import digest, load
from fastgpt2.weights.digest import weights_sha256
from tests.tiny_gpt import tiny_gpt

TARGETS = ("c_attn", "mlp.c_proj", "c_fc")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 as Hugging Face keeps it."""
    path = tmp_path_factory.mktemp("base") / "hf"
    tiny_gpt().save_pretrained(path, format="hf")
    return path


def randomised(base: Path, **options: Any) -> GPT:
    """A GPT with adapters of rank 4 whose B is not zero."""
    model = GPT.from_pretrained(base)
    add_lora(model, rank=4, alpha=12.0, targets=TARGETS, base=str(base), **options)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.normal_(std=0.05)
    return model


def batches(count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return list(torch.randint(61, (count, 3, 13), generator=generator))


def curve(model: torch.nn.Module, loss_of: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    losses = []
    for tokens in batches():
        loss = loss_of(tokens)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("start", ["zero", "random"])
def test_the_loss_curve_is_pefts(base: Path, tmp_path: Path, start: str) -> None:
    """Same weights, same A and B, AdamW: six steps, to the rounding of fp32."""
    ours = randomised(base).train()
    if start == "zero":
        with torch.no_grad():
            for layer in adapters(ours).values():
                layer.lora_B.zero_()
    save_adapter(ours, tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path, is_trainable=True
    ).train()
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in ours.parameters() if p.requires_grad) > 0

    def our_loss(tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = ours(tokens[:, :-1], tokens[:, 1:].contiguous())[1]
        return loss

    def their_loss(tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = theirs(tokens, labels=tokens).loss
        return loss

    a, b = curve(ours, our_loss), curve(theirs, their_loss)
    assert a[0] != pytest.approx(a[-1], rel=1e-2)
    assert a == pytest.approx(b, rel=3e-6)


def test_what_peft_writes_is_read(base: Path, tmp_path: Path) -> None:
    """Its adapters as a model of ours: attached, and added to the weights."""
    hf: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["c_attn", "c_proj"], use_rslora=True, lora_dropout=0.1
    )
    theirs: Any = peft.get_peft_model(hf, settings).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "peft")
    attached = GPT.from_pretrained(base)
    load_adapter(attached, tmp_path / "peft")
    merged = GPT.from_pretrained(tmp_path / "peft")
    idx = batches(1)[0]
    with torch.no_grad():
        expected = theirs(idx).logits
        for model in (attached.eval(), merged.eval()):
            torch.testing.assert_close(model.logits(idx), expected, rtol=1e-4, atol=1e-4)
    assert attached.lora is not None and attached.lora.dropout == 0.1 and merged.lora is None


def test_adapters_come_back_bit_for_bit(base: Path, tmp_path: Path) -> None:
    model = randomised(base, dropout=0.2)
    save_adapter(model, tmp_path)
    other = GPT.from_pretrained(base)
    load_adapter(other, tmp_path)
    assert other.lora == model.lora
    theirs = other.state_dict()
    assert all(torch.equal(x, theirs[name]) for name, x in model.state_dict().items())
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 4 * trained < size < 4 * trained + 4096
    assert any("adapters" in note for note in load(tmp_path).notes)


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    record = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "only LoRA is known, got 'IA3'"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"rank_pattern": {"c_fc": 2}}, "rank_pattern = .* is not supported"),
        ({"modules_to_save": ["wte"]}, "modules_to_save = .* is not supported"),
        ({"r": 5}, r"has A \(4, 48\) and B \(144, 4\), the rank is 5"),
        ({"r": "4"}, "is not of its type"),
        ({"base_model_name_or_path": None}, "does not say which weights it adapts"),
        ({"base_model_name_or_path": "/nowhere"}, "the weights that it adapts: /nowhere: no such"),
    ],
)
def test_what_is_refused(base: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_adapter(randomised(base), tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_adapters_that_name_themselves_end(base: Path, tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a"), ("c", "c")):
        save_adapter(randomised(base), tmp_path / name)
        rewrite(tmp_path / name, base_model_name_or_path=str(tmp_path / other))
    for name in "abc":
        with pytest.raises(UserError, match="its weights are adapters of themselves") as error:
            load(tmp_path / name)
        assert len(str(error.value)) < 1000


def test_adapters_of_another_model_are_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(randomised(base), tmp_path)
    for fields, message in (
        ({"n_embd": 24}, "is for a weight of .144, 48., the model has .72, 24."),
        ({"n_layer": 1}, r"h\.1\..*'?; there are c_attn"),
    ):
        model = tiny_gpt(**fields)
        with pytest.raises(UserError, match=message):
            load_adapter(model, tmp_path)


def test_an_adapter_of_something_else_is_named(base: Path, tmp_path: Path) -> None:
    save_adapter(randomised(base), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.transformer.wte.lora_embedding_A"
    save_file(tensors | {name: torch.zeros(4, 61)}, path)
    with pytest.raises(UserError, match=f"unexpected '{name}'"):
        load(tmp_path)


@pytest.mark.parametrize("flags", [[], ["--offline"]])
def test_offline_holds_for_the_weights_below(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    asked: list[bool] = []

    def fetch(name: str, *, offline: bool) -> Path:
        asked.append(offline)
        return base

    monkeypatch.setattr("fastgpt2.weights.hub.fetch", fetch)
    save_adapter(randomised(base), tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    record = json.loads(config.read_text("utf-8")) | {"base_model_name_or_path": "gpt2"}
    config.write_text(json.dumps(record), "utf-8")
    assert convert([str(config.parent), str(tmp_path / "out"), "--to=hf", *flags]) == 0
    assert asked == [bool(flags)]


def test_unchanged_weights_are_hashed_once(base: Path, tmp_path: Path) -> None:
    opened = load(shutil.copytree(base, tmp_path / "copy"))
    first, misses = weights_sha256(opened), digest._sha256.cache_info().misses
    assert weights_sha256(opened) == first and digest._sha256.cache_info().misses == misses
    [path] = opened.files
    path.write_bytes(path.read_bytes()[:-4] + b"last")
    assert weights_sha256(opened) != first
