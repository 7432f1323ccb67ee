"""What others do with the weights and the models, each with the program itself where it is there.

CONTRIBUTING says how to install them all; the tests of those that are not installed are skipped.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader

from fastgpt2.model import GPT
from fastgpt2.weights import load, save
from tests.integrations.tiny_hf import VOCAB, assert_close, pair, tokens
from tests.tiny_gpt import tiny_config, tiny_gpt

# equal losses: the same sums in another order
LOSS_TOLERANCE = 1e-3


def words() -> Any:
    """A tokenizer whose token i is the word ``t<i>``."""
    model = models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(bos_token="t0", eos_token="t0", unk_token="t0", pad_token=f"t{VOCAB - 1}")
    fast: Any = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, **special)


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, Any]:
    """A folder that our converter has written, and transformers' model of the same weights."""
    theirs, _ = pair()
    theirs.save_pretrained(tmp_path / "theirs")
    path = save(load(tmp_path / "theirs"), tmp_path / "ours", "openai")
    folder = save(load(path), tmp_path / "hf", "hf")
    words().save_pretrained(folder)
    return folder, theirs


def test_ctranslate2_converts_an_exported_folder(
    exported: tuple[Path, Any], tmp_path: Path
) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2", reason="CTranslate2 is not installed")
    folder, theirs = exported
    converter = ctranslate2.converters.TransformersConverter(str(folder))
    generator = ctranslate2.Generator(converter.convert(str(tmp_path / "ct2")), device="cpu")
    ids = tokens(2, 9)
    logits = generator.forward_batch([[f"t{i}" for i in row] for row in ids.tolist()])
    assert_close(torch.from_numpy(np.array(logits)), theirs(ids).logits.detach())


def test_llama_cpp_knows_every_tensor_and_key(exported: tuple[Path, Any]) -> None:
    """What ``convert_hf_to_gguf.py`` reads for a GPT-2: names by llama.cpp's table, five sizes."""
    gguf = pytest.importorskip("gguf", reason="gguf, llama.cpp's library, is not installed")
    folder, _ = exported
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 2)
    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        unknown = [
            name
            for name in file.keys()  # noqa: SIM118 - not a dict
            if names.get_name(name, try_suffixes=(".weight", ".bias")) is None
        ]
    assert unknown == []
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["GPT2LMHeadModel"]
    keys = ("n_layer", "n_ctx", "n_embd", "n_head", "layer_norm_epsilon")
    assert [config[key] for key in keys] == [2, 48, 24, 2, 1e-5]


def test_transformer_lens_reads_the_drop_in_class(tmp_path: Path) -> None:
    reason = "TransformerLens 4 is not installed"
    lens = pytest.importorskip("transformer_lens.model_bridge", reason=reason)
    theirs, ours = pair()
    # it makes the tokenizer again, from its folder
    words().save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    options = dict(hf_model=ours, tokenizer=tokenizer, device="cpu")
    bridge = lens.TransformerBridge.boot_transformers("gpt2", **options)
    expected = theirs(tokens()).logits
    logits, seen = bridge.run_with_cache(tokens())
    assert_close(logits, expected)
    assert len(seen) > 20
    cut = ("blocks.0.hook_mlp_out", lambda x, hook: x * 0.0)
    without = bridge.run_with_hooks(tokens(), fwd_hooks=[cut])
    assert not torch.allclose(without, expected, atol=0.1)


def test_nnsight_reads_and_changes_activations() -> None:
    nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed")
    found = []
    for model in pair():
        seen = nnsight.NNsight(model)
        with seen.trace(tokens()):
            hidden = seen.transformer.h[0].mlp.output.save()
            logits = seen.lm_head.output.save()
        with seen.trace(tokens()):
            seen.transformer.h[0].mlp.output[:] = 0
            without = seen.lm_head.output.save()
        assert not torch.allclose(logits, without, atol=0.1)
        found.append((hidden, logits, without))
    assert_close(found[1], found[0])
    model, ids = tiny_gpt().eval(), tokens()
    seen = nnsight.NNsight(model)
    with seen.trace(ids):
        seen.transformer.h[0].mlp.output[:] = 0
        without = seen.output.save()
    assert not torch.allclose(without[0], model(ids)[0], atol=1e-3)


def test_trl_fine_tunes_as_with_theirs(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    texts = [" ".join(f"t{i * j % 59 + 1}" for j in range(5 + i)) for i in range(8)]
    losses = []
    for name, model in zip(("theirs", "ours"), pair(), strict=True):
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path / name),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            max_length=16,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            seed=1,
        )
        data = datasets.Dataset.from_dict({"text": texts})
        trainer = trl.SFTTrainer(
            model, args=arguments, train_dataset=data, processing_class=words()
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], abs=LOSS_TOLERANCE)


def plain_losses(batches: list[torch.Tensor], epochs: int) -> list[float]:
    torch.manual_seed(0)
    model, losses = GPT(tiny_config()), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches * epochs:
        loss = model(batch[:, :-1], batch[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_lightning_trains_saves_and_resumes(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined,unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.gpt: nn.Module = GPT(tiny_config())
            self.losses: list[float] = []

        def training_step(self, batch: torch.Tensor, number: int) -> Any:
            loss = self.gpt(batch[:, :-1], batch[:, 1:])[1]
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.gpt.parameters(), lr=1e-2)

    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    batches: Any = [tokens(2, 10, seed=i) for i in range(3)]

    def fit(epochs: int, **options: Any) -> Any:
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=epochs, default_root_dir=str(tmp_path), **quiet
        )
        module = Module()
        trainer.fit(module, DataLoader(batches, batch_size=None), **options)
        return trainer, module

    trainer, first = fit(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    _, second = fit(3, ckpt_path=str(tmp_path / "two.ckpt"), weights_only=False)
    assert first.losses + second.losses == pytest.approx(plain_losses(batches, 3), abs=1e-6)
