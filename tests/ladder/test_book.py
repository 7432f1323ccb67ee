"""A reader's programs: chapters typed against modules that hold this package's names.

The programs are ours, written in the manner of the book: the same imports, calls and arguments.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastgpt2 import GPT, ladder
from fastgpt2.errors import UserError
from fastgpt2.ladder import GPT2Tokenizer, GPTModel, to_fastgpt2
from fastgpt2.weights import hub
from tests.ladder.tiny import SMALL, story
from tests.loopback import content, serve
from tests.text.tiny import tiny_files

GOLDEN = Path(__file__).parents[1] / "golden" / "openai-tiny"


class OwnGPTModel(nn.Module):
    """What a reader builds in chapter 4: the same modules, and no configuration kept."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        blocks = [ladder.TransformerBlock(cfg) for _ in range(cfg["n_layers"])]
        self.trf_blocks = nn.Sequential(*blocks)
        self.final_norm = ladder.LayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, in_idx: Tensor) -> Tensor:
        positions = torch.arange(in_idx.shape[1], device=in_idx.device)
        x = self.drop_emb(self.tok_emb(in_idx) + self.pos_emb(positions))
        logits: Tensor = self.out_head(self.final_norm(self.trf_blocks(x)))
        return logits


@pytest.fixture
def shim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The modules that the chapters import from, a tiny vocabulary, and a folder to run in."""
    for name in ("previous_chapters", "gpt_download"):
        monkeypatch.setitem(sys.modules, name, ladder)
    tokenizer = GPT2Tokenizer(*tiny_files())
    monkeypatch.setattr("fastgpt2.ladder.windows.get_tokenizer", lambda name: tokenizer)
    monkeypatch.setitem(sys.modules, "readers", sys.modules[__name__])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


PRETRAINING = """
import torch
from previous_chapters import (
    create_dataloader_v1, train_model_simple, generate_and_print_sample, plot_losses,
    SelfAttention_v1, SelfAttention_v2, PyTorchMultiHeadAttention, GPTDatasetV1,
)

torch.manual_seed(123)
loader = create_dataloader_v1(
    txt=text, batch_size=4, max_length=16, stride=16, drop_last=True, shuffle=True, num_workers=0
)
same = create_dataloader_v1(text, 4, 16, 16, True, True, 0)
assert len(loader.dataset.input_ids) == len(same.dataset.target_ids) == len(loader.dataset)
model = Model(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
train_losses, val_losses, tokens_seen = train_model_simple(
    model, loader, same, optimizer, "cpu", num_epochs=2, eval_freq=5, eval_iter=2,
    start_context="the stranger<|endoftext|>the", tokenizer=tokenizer,
)
generate_and_print_sample(model, tokenizer, "cpu", "the")
plot_losses(torch.linspace(0, 2, len(train_losses)), tokens_seen, train_losses, val_losses)
batch = torch.rand(2, 6, 12)
shapes = [
    SelfAttention_v1(d_in=12, d_out=8)(batch).shape,
    SelfAttention_v2(d_in=12, d_out=8)(batch).shape,
    PyTorchMultiHeadAttention(d_in=12, d_out=8, num_heads=2)(batch).shape,
]
"""


@pytest.mark.filterwarnings("error")
def test_pretraining_with_the_readers_own_model(
    shim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = GPT2Tokenizer(*tiny_files())
    text = "<|endoftext|>".join([story(20), story(10)])
    config = SMALL | {"vocab_size": tokenizer.vocab_size}
    results = []
    for model in (OwnGPTModel, GPTModel):
        names: dict[str, Any] = dict(text=text, tokenizer=tokenizer, config=config, Model=model)
        exec(PRETRAINING, names)
        results.append(names)
    own, ours = results
    # the two models differ in where the positions are added alone
    assert own["train_losses"] == pytest.approx(ours["train_losses"], abs=2e-6)
    assert own["val_losses"][-1] < own["val_losses"][0]
    assert own["shapes"] == [(2, 6, 8)] * 3
    assert (shim / "loss-plot.pdf").read_bytes().startswith(b"%PDF")
    ids = torch.cat(own["same"].dataset.input_ids)
    assert ids.tolist().count(tokenizer.eot) == 1
    assert capsys.readouterr().out.count("the stranger<|endoftext|>the") == 4


def test_a_picture_that_cannot_be_drawn_loses_no_model(
    shim: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ImportError("no backend of\nthat name")

    monkeypatch.setattr("matplotlib.pyplot.subplots", fail)
    ladder.plot_losses([1.0, 2.0], [10, 20], [2.0, 1.0], [2.0, 1.5])
    assert capsys.readouterr().out == "loss-plot.pdf: not drawn (no backend of that name)\n"


def test_what_a_sample_needs_is_asked_before_the_first_step() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())

    class Untouched(list[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Any:
            raise AssertionError("training has begun")

    loaders = Untouched(), Untouched()
    with pytest.raises(UserError, match="Linear: no pos_emb"):
        ladder.train_model_simple(model, *loaders, optimizer, "cpu", 1, 1, 1, "the", TINY)


TINY = GPT2Tokenizer(*tiny_files())

LOADING = """
from gpt_download import download_and_load_gpt2, load_gpt2_params_from_tf_ckpt
from previous_chapters import assign, load_weights_into_gpt

settings, params = download_and_load_gpt2(model_size="124M", models_dir="gpt2")
again = load_gpt2_params_from_tf_ckpt("gpt2/124M/model.ckpt", settings)
model = Model({
    "vocab_size": settings["n_vocab"], "context_length": settings["n_ctx"],
    "emb_dim": settings["n_embd"], "n_heads": settings["n_head"],
    "n_layers": settings["n_layer"], "drop_rate": 0.0, "qkv_bias": True,
})
load_weights_into_gpt(model, params)
model.final_norm.scale = assign(model.final_norm.scale, params["g"])
"""


@pytest.mark.parametrize("model", [OwnGPTModel, GPTModel])
def test_the_released_weights(
    shim: Path, monkeypatch: pytest.MonkeyPatch, model: type[nn.Module]
) -> None:
    names: dict[str, Any] = {"Model": model}
    with serve() as site:
        monkeypatch.setattr(hub, "OPENAI_MIRRORS", (f"{site.url}/models",))
        for name in hub.OPENAI_FILES:
            file = GOLDEN / name
            site.add(f"/models/124M/{name}", content(file.read_bytes() if file.exists() else b"{}"))
        exec(LOADING, names)
    assert names["settings"] == json.loads((GOLDEN / "hparams.json").read_bytes())
    params, gpt = names["params"], names["model"].double().eval()
    assert params["blocks"][1]["attn"]["c_attn"]["w"].shape == (128, 384)
    np.testing.assert_array_equal(params["wte"], names["again"]["wte"])
    idx = torch.arange(60).view(2, 30)
    for ours in (GPT.from_pretrained(str(GOLDEN)).double(), to_fastgpt2(gpt)):
        torch.testing.assert_close(gpt(idx), ours.eval().logits(idx))


def test_mistakes_of_the_loader(shim: Path) -> None:
    with pytest.raises(UserError, match="model_size must be one of 124M, 355M, 774M, 1558M"):
        ladder.download_and_load_gpt2("117M", "gpt2")
    with pytest.raises(UserError, match=r"has model/h1/.*, but n_layer is 1"):
        ladder.load_gpt2_params_from_tf_ckpt(GOLDEN / "model.ckpt", {"n_layer": 1})
    with pytest.raises(ValueError, match=r"left is \(2,\), right \(3,\)"):
        ladder.assign(torch.zeros(2), np.zeros(3))


@pytest.mark.parametrize("allowed", ["all", {"<|endoftext|>"}])
def test_the_end_of_text_is_one_token_where_it_is_allowed(allowed: Any) -> None:
    text = "the<|endoftext|>end"
    expected = [*TINY.encode("the"), TINY.eot, *TINY.encode("end")]
    assert TINY.encode(text, allowed_special=allowed) == expected
    assert TINY.encode(text, allow_special=True) == expected
    assert ladder.text_to_token_ids(text, TINY).tolist() == [expected]
    windows = ladder.create_dataloader(text, 1, 2, 1, shuffle=False, tokenizer=TINY)
    assert next(iter(windows))[0].tolist() == [expected[:2]]
    assert TINY.eot not in TINY.encode(text)
    with pytest.raises(UserError, match="no special token '<pad>'"):
        TINY.encode(text, allowed_special={"<pad>"})
