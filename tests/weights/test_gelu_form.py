"""The form of the GELU travels with the weights, and no format changes it unsaid."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.convert import main
from fastgpt2.errors import UserError
from fastgpt2.ladder import from_fastgpt2
from fastgpt2.model import GPT
from fastgpt2.weights import FORMATS, load, nanogpt, save
from tests.kernels.budget import DEVICE
from tests.weights.conftest import (
    TINY,
    hf_logits,
    hf_model,
    our_logits,
    random_checkpoint,
    same_bits,
)

ERF = replace(TINY, gelu="erf")
TOKENS = torch.arange(16)[None]


def _nanogpt_file(folder: Path) -> Path:
    """A checkpoint as nanoGPT's own training writes it, which says nothing of the GELU."""
    path = save(random_checkpoint(ERF), folder / "ckpt.pt", "nanogpt")
    content = torch.load(path, weights_only=True)
    assert content["config"] == {}
    # large enough for the two forms to differ
    model = {name: 4 * tensor for name, tensor in content["model"].items()}
    torch.save(content | {"model": model, "config": {"dataset": "shakespeare"}}, path)
    return path


def _written_out(state: dict[str, Tensor], approximate: str) -> Tensor:
    """Logits of a GPT-2 with two heads, from PyTorch's functions alone."""

    def layer(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"transformer.{name}.weight"], state[f"transformer.{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = state[f"transformer.{name}.weight"], state[f"transformer.{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias)

    state = {name: tensor.double() for name, tensor in state.items()}
    x = state["transformer.wte.weight"][TOKENS] + state["transformer.wpe.weight"]
    for i in range(TINY.n_layer):
        qkv = layer(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        q, k, v = (part.view(1, 16, 2, -1).transpose(1, 2) for part in qkv.chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + layer(out.transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
        hidden = F.gelu(layer(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate=approximate)
        x = x + layer(hidden, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ state["transformer.wte.weight"].T


def test_nanogpt_logits_are_those_it_was_trained_with(tmp_path: Path) -> None:
    path = _nanogpt_file(tmp_path)
    state = torch.load(path, weights_only=True)["model"]
    exact, tanh = _written_out(state, "none"), _written_out(state, "tanh")
    assert (exact - tanh).abs().max() > 5e-5
    torch.testing.assert_close(our_logits(path, TOKENS).double(), exact, rtol=0.0, atol=1e-5)
    kernels = GPT.from_pretrained(path, {"impl": "triton"}).to(DEVICE).eval()
    found = kernels.logits(TOKENS.to(DEVICE)).cpu().double()
    torch.testing.assert_close(found, exact, rtol=0.0, atol=1e-5)
    # files of older versions of nanoGPT are read by saying so
    old = GPT.from_pretrained(path, {"gelu": "tanh"}).eval()
    torch.testing.assert_close(old.logits(TOKENS).double(), tanh, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_every_format_keeps_the_form_or_refuses_it(tmp_path: Path, gelu: str) -> None:
    checkpoint = random_checkpoint(replace(TINY, gelu=gelu))
    kept = set()
    for format in FORMATS:
        try:
            path = save(checkpoint, tmp_path / format, format)
        except UserError as error:
            assert str(error) == (
                f"format {format} means the tanh GELU, and random has the erf GELU: logits would "
                "change (formats hf, nanogpt and fastgpt2 keep it; convert --gelu tanh forces it)"
            )
            assert not (tmp_path / format).exists()
            continue
        kept.add(format)
        assert load(path).config.gelu == gelu
    assert kept == (set(FORMATS) if gelu == "tanh" else {"hf", "nanogpt", "fastgpt2"})


@pytest.mark.parametrize(
    ("name", "form"), [("gelu_new", "tanh"), ("gelu_pytorch_tanh", "tanh"), ("gelu", "erf")]
)
def test_hugging_face_s_names(tmp_path: Path, name: str, form: str) -> None:
    model = hf_model(TINY, activation_function=name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    model.save_pretrained(tmp_path / "theirs")
    checkpoint = load(tmp_path / "theirs")
    assert checkpoint.config.gelu == form
    expected = hf_logits(model, TOKENS)
    torch.testing.assert_close(our_logits(tmp_path / "theirs", TOKENS), expected, rtol=0, atol=5e-5)
    other = GPT.from_pretrained(tmp_path / "theirs", {"gelu": "tanh" if form == "erf" else "erf"})
    assert (other.eval().logits(TOKENS) - expected).abs().max() > 1e-4
    folder = save(checkpoint, tmp_path / "ours", "hf")
    written = json.loads((folder / "config.json").read_text("utf-8"))["activation_function"]
    assert written == ("gelu" if form == "erf" else "gelu_new")


def test_a_model_saves_and_resumes_with_its_form(tmp_path: Path) -> None:
    GPT.from_pretrained(_nanogpt_file(tmp_path)).save_pretrained(tmp_path / "run")
    assert GPT.from_pretrained(tmp_path / "run").config.gelu == "erf"


def test_conversion_says_what_nanogpt_computes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("tanh", "erf"):
        source = save(random_checkpoint(replace(TINY, gelu=form)), tmp_path / form, "hf")
        assert main([str(source), str(tmp_path / f"{form}.pt"), "--to", "nanogpt"]) == 0
        said = "the model has the tanh GELU, nanoGPT computes the erf GELU: its logits differ"
        assert (said in capsys.readouterr().out) == (form == "tanh")
    assert main([str(tmp_path / "erf.pt"), str(tmp_path / "x.bin"), "--to", "llmc"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fastgpt2 convert: error: format llmc means the tanh GELU")
    # what we wrote from a tanh model comes back as one
    assert load(tmp_path / "tanh.pt").config.gelu == "tanh"


def test_a_forged_form_is_one_line(tmp_path: Path) -> None:
    path = _nanogpt_file(tmp_path)
    content = torch.load(path, weights_only=True)
    for forged in ("relu", ["erf"], None):
        torch.save(content | {"config": {nanogpt.GELU: forged}}, path)
        with pytest.raises(UserError, match=r"ckpt\.pt: .*gelu must be"):
            load(path)


def test_the_ladder_has_the_tanh_form_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the ladder has the tanh GELU, the model has the erf GELU"):
        from_fastgpt2(GPT(ERF))


def test_a_form_may_be_forced(tmp_path: Path) -> None:
    """A format that cannot say it gets it when asked; files of nanoGPT's first months had tanh."""
    source = _nanogpt_file(tmp_path)
    forced = ("--gelu", "tanh")
    for to in ("llmc", "openai", "hf"):
        assert main([str(source), str(tmp_path / to), "--to", to, *forced]) == 0
        found = load(tmp_path / to)
        assert found.config.gelu == "tanh" and same_bits(found, load(source))
    # a folder that brings its own configuration
    assert main([str(tmp_path / "hf"), str(tmp_path / "erf"), "--to", "hf", "--gelu", "erf"]) == 0
    assert load(tmp_path / "erf").config.gelu == "erf"
    expected = our_logits(source, TOKENS)
    torch.testing.assert_close(our_logits(tmp_path / "erf", TOKENS), expected, rtol=0.0, atol=1e-5)
