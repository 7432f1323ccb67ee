"""Every format into every other: same bits, same logits, and what programs of theirs expect."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.model import GPT
from fastgpt2.weights import FORMATS, Checkpoint, load, save
from fastgpt2.weights.checkpoint import parameter_shapes
from fastgpt2.weights.formats import detect
from tests.weights.conftest import GOLDEN, random_checkpoint, same_bits

TINY = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32)


@pytest.mark.parametrize(("first", "second"), list(product(FORMATS, repeat=2)))
def test_openai_to_every_format_and_back_is_exact(tmp_path: Path, first: str, second: str) -> None:
    path = save(load(GOLDEN), tmp_path / "first", first)
    path = save(load(path), tmp_path / "second", second)
    assert detect(tmp_path / "second")[0] == second
    path = save(load(path), tmp_path / "third", "openai")
    for name in ("model.ckpt.index", "model.ckpt.data-00000-of-00001", "hparams.json"):
        assert (path / name).read_bytes() == (GOLDEN / name).read_bytes()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept_or_widened(tmp_path: Path, format: str, dtype: torch.dtype) -> None:
    checkpoint = random_checkpoint(TINY, dtype)
    back = load(save(checkpoint, tmp_path / "x", format))
    expected = dtype if dtype in FORMATS[format].dtypes else torch.float32
    assert back.dtype == expected
    assert same_bits(back, checkpoint.to(expected))
    assert back.config == TINY


@pytest.mark.parametrize("format", FORMATS)
def test_explicit_dtype(tmp_path: Path, format: str) -> None:
    checkpoint = random_checkpoint(TINY)
    if torch.bfloat16 not in FORMATS[format].dtypes:
        with pytest.raises(UserError, match=f"format {format} holds float32, not bfloat16"):
            save(checkpoint, tmp_path / "x", format, dtype=torch.bfloat16)
        assert not (tmp_path / "x").exists()
        return
    back = load(save(checkpoint, tmp_path / "x", format, dtype=torch.bfloat16))
    assert same_bits(back, checkpoint.to(torch.bfloat16))


def hf_model(config: GPTConfig, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            bos_token_id=None,
            eos_token_id=None,
            **options,
        )
    )
    # transformers starts biases at 0 and gains at 1, which would hide that they are ignored
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def hf_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    return logits


def our_logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return GPT.from_pretrained(str(path)).eval().logits(tokens)


# the widths and heads of the four releases, one layer deep; the first with a padded vocabulary
@pytest.mark.parametrize(
    ("name", "vocab_size"),
    [("gpt2", 4999), ("gpt2-medium", 515), ("gpt2-large", 515), ("gpt2-xl", 515)],
)
def test_logits_of_every_size_from_every_format(tmp_path: Path, name: str, vocab_size: int) -> None:
    config = GPTConfig.preset(name, n_layer=1, vocab_size=vocab_size, block_size=64)
    theirs = hf_model(config)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = torch.randint(vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = hf_logits(theirs, tokens)
    assert expected.std() > 0.5
    checkpoint = load(tmp_path / "theirs")
    assert replace(checkpoint.config, dropout=0.0) == config
    for format in FORMATS:
        path = save(checkpoint, tmp_path / format, format)
        assert (our_logits(path, tokens) - expected).abs().max() <= 1e-4


def test_exported_folder_loads_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = save(load(GOLDEN), tmp_path / "hf", "hf")
    model, info = transformers.GPT2LMHeadModel.from_pretrained(path, output_loading_info=True)
    assert all(not problems for problems in info.values()), info
    with np.load(GOLDEN / "expected.npz") as expected:
        tokens = torch.from_numpy(expected["tokens"]).long()
        logits = torch.from_numpy(expected["logits"])
    assert (hf_logits(model.eval(), tokens) - logits).abs().max() <= 1e-4
    assert model.dtype == torch.float32
    assert transformers.AutoModelForCausalLM.from_pretrained(path).config.n_ctx == 64


def test_transformers_keeps_the_exported_dtype(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = save(load(GOLDEN), tmp_path / "hf", "hf", dtype=torch.bfloat16)
    model = transformers.GPT2LMHeadModel.from_pretrained(path, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.config.dtype == torch.bfloat16


def hf_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "form", ["sharded", "bin", "old bin", "sharded bin", "bare", "masks", "head only"]
)
def test_forms_of_hugging_face_folders(tmp_path: Path, form: str) -> None:
    from safetensors.torch import save_file

    model = hf_model(TINY)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if form == "sharded" else "5GB")
    if form == "sharded":
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
        assert load(tmp_path).source.name == "model.safetensors.index.json"
        tokens = torch.arange(16)[None]
        assert (our_logits(tmp_path, tokens) - hf_logits(model, tokens)).abs().max() <= 1e-5
        return
    # kept apart: the original goes
    expected = load(save(load(tmp_path), tmp_path / "kept", "hf"))
    (tmp_path / "model.safetensors").unlink()
    state = hf_state(model)
    if form == "bare":
        state = {
            name.removeprefix("transformer."): tensor
            for name, tensor in state.items()
            if name != "lm_head.weight"
        }
    if form == "masks":
        for i in range(TINY.n_layer):
            state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).bool().tril()
            state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    if form == "head only":
        del state["transformer.wte.weight"]
    if form == "sharded bin":
        names = {name: f"part-{len(name) % 2}.bin" for name in state}
        for file in set(names.values()):
            part = {name: state[name] for name in state if names[name] == file}
            torch.save(part, tmp_path / file)
        index = {"metadata": {}, "weight_map": names}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index), "utf-8")
    elif form.endswith("bin"):
        old = form == "old bin"
        path = tmp_path / "pytorch_model.bin"
        torch.save(state, path, _use_new_zipfile_serialization=not old)
    else:
        save_file(state, tmp_path / "model.safetensors")
    assert same_bits(load(tmp_path), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"activation_function": "gelu"}, "activation_function = 'gelu' is not GPT-2's 'gelu_new'"),
        ({"n_inner": 100}, "n_inner = 100, expected 128"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"n_embd": None}, "n_embd must be a positive integer, got None"),
        ({"n_layer": 10**30}, "n_layer is 1000000000000000000000000000000"),
        (
            {"n_positions": 17},
            r"'transformer.wpe.weight' has shape \(16, 32\), expected \(17, 32\)",
        ),
        ({"vocab_size": 64}, r"'transformer.wte.weight' has shape \(65, 32\), expected \(64, 32\)"),
        ({"n_layer": 1}, r"unexpected 'transformer.h.1.attn.c_attn.bias', .* and 4 more"),
        ({"n_layer": 3}, r"missing 'transformer.h.2.ln_1.weight', .* and 4 more"),
        ({"attn_pdrop": 1.5}, "dropout must be in"),
    ],
)
def test_options_that_are_not_gpt2s(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = save(random_checkpoint(TINY), tmp_path / "hf", "hf")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    with pytest.raises(UserError, match=message):
        load(folder)


def test_untied_head_is_refused(tmp_path: Path) -> None:
    folder = save(random_checkpoint(TINY), tmp_path / "hf", "hf")
    state = hf_state(hf_model(TINY))
    state["lm_head.weight"][3, 4] += 1e-6
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"'lm_head.weight' differs from 'transformer.wte.weight'"):
        load(folder)


def test_extra_head_is_refused_by_name(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = hf_model(TINY).config
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"unexpected 'transformer.score.weight'"):
        load(tmp_path)


def test_dropout_rates_travel(tmp_path: Path) -> None:
    rates = {"attn_dropout": 0.1, "embd_dropout": 0.2, "resid_dropout": 0.0}
    checkpoint = random_checkpoint(replace(TINY, **rates))  # type: ignore[arg-type]
    config = load(save(checkpoint, tmp_path / "x", "hf")).config
    assert (config.attn_p, config.embd_p, config.resid_p) == (0.1, 0.2, 0.0)
    config = load(save(random_checkpoint(replace(TINY, dropout=0.3)), tmp_path / "y", "hf")).config
    assert config == replace(TINY, dropout=0.3)


def nanogpt_content(checkpoint: Checkpoint, padded: int = 0) -> dict[str, Any]:
    """What nanoGPT's train.py saves."""
    state = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    wte = torch.nn.functional.pad(state["transformer.wte.weight"], (0, 0, 0, padded))
    config = checkpoint.config
    args = {
        key: getattr(config, key)
        for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    }
    return {
        "model": {**state, "transformer.wte.weight": wte, "lm_head.weight": wte},
        "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": []},
        "model_args": args | {"vocab_size": config.vocab_size + padded},
        "iter_num": 5,
        "best_val_loss": torch.tensor(3.5),
        "config": {"dataset": "shakespeare_char", "learning_rate": 1e-3, "compile": True},
    }


def test_nanogpt_compiled_with_masks_and_without_bias(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(replace(TINY, bias=False))
    content = nanogpt_content(checkpoint)
    for i in range(TINY.n_layer):
        content["model"][f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    content["model"] = {f"_orig_mod.{name}": t for name, t in content["model"].items()}
    torch.save(content, tmp_path / "ckpt.pt")
    back = load(tmp_path)
    assert same_bits(back, checkpoint)
    assert back.config == replace(TINY, bias=False)
    # formats with biases get zeros, which is the same function
    tokens = torch.arange(16)[None]
    path = save(back, tmp_path / "hf", "hf")
    assert torch.equal(our_logits(path, tokens), our_logits(tmp_path / "ckpt.pt", tokens))


def test_nanogpt_padded_vocabulary_is_cut(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(replace(TINY, vocab_size=50257, n_embd=4, n_layer=1))
    torch.save(nanogpt_content(checkpoint, padded=47), tmp_path / "ckpt.pt")
    back = load(tmp_path / "ckpt.pt")
    assert back.config.vocab_size == 50257
    assert same_bits(back, checkpoint)
    assert back.notes == ("cut the vocabulary from 50304 padded rows to GPT-2's 50257",)


def test_nanogpt_old_model_args(tmp_path: Path) -> None:
    content = nanogpt_content(random_checkpoint(TINY))
    del content["model_args"]["bias"], content["model_args"]["dropout"]
    torch.save(content, tmp_path / "ckpt.pt")
    assert load(tmp_path).config == TINY
    del content["model_args"]["n_head"]
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"ckpt\.pt: 'n_head' is missing"):
        load(tmp_path)


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_can_resume_what_we_write(tmp_path: Path, bias: bool) -> None:
    checkpoint = random_checkpoint(replace(TINY, bias=bias))
    save(checkpoint, tmp_path / "ckpt.pt", "nanogpt")
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    # the steps of nanoGPT's train.py with init_from = "resume"
    keys = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    model = GPT(GPTConfig(**{key: content["model_args"][key] for key in keys}))
    model.load_state_dict(content["model"])
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    optimizer.load_state_dict(content["optimizer"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert (content["iter_num"], content["best_val_loss"]) == (0, 1e9)
    before = model.lm_head.weight.detach().clone()
    model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))[1].backward()
    optimizer.step()
    assert not torch.equal(before, model.lm_head.weight)
    # one tensor under two names, not two
    head, wte = content["model"]["lm_head.weight"], content["model"]["transformer.wte.weight"]
    assert head.data_ptr() == wte.data_ptr()


def test_strided_and_offset_tensors_of_torch_files(tmp_path: Path) -> None:
    content = nanogpt_content(random_checkpoint(TINY))
    name = "transformer.h.1.mlp.c_fc.weight"
    expected = content["model"][name].clone()
    content["model"][name] = expected.t().contiguous().t()
    big = torch.zeros(9, 32)
    big[3] = content["model"]["transformer.ln_f.bias"]
    content["model"]["transformer.ln_f.bias"] = big[3]
    torch.save(content, tmp_path / "ckpt.pt")
    assert same_bits(load(tmp_path), random_checkpoint(TINY))
    assert torch.equal(load(tmp_path).state_dict()[name], expected)
    assert load(tmp_path).state_dict()[name].is_contiguous()


def llmc_bytes(checkpoint: Checkpoint, version: int, padded: int) -> bytes:
    """A file as llm.c's write_model makes it, parameter by parameter."""
    config = checkpoint.config
    numbers = (20240326, version, config.block_size, config.vocab_size, config.n_layer)
    header = np.zeros(256, np.int32)
    header[:8] = [*numbers, config.n_head, config.n_embd, padded]
    dtype = torch.float32 if version == 3 else torch.bfloat16

    def raw(name: str) -> bytes:
        tensor = checkpoint.tensors[name].read().to(dtype).contiguous()
        return tensor.view(torch.uint8).numpy().tobytes()

    out = header.tobytes() + raw("transformer.wte.weight")
    out += bytes((padded - config.vocab_size) * config.n_embd * dtype.itemsize)
    out += raw("transformer.wpe.weight")
    for name in (
        "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias",
        "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias",
        "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
    ):  # fmt: skip
        for layer in range(config.n_layer):
            out += raw(f"transformer.h.{layer}.{name}")
    return out + raw("transformer.ln_f.weight") + raw("transformer.ln_f.bias")


@pytest.mark.parametrize(("version", "dtype"), [(3, torch.float32), (5, torch.bfloat16)])
def test_llmc_bytes(tmp_path: Path, version: int, dtype: torch.dtype) -> None:
    checkpoint = random_checkpoint(TINY, dtype)
    expected = llmc_bytes(checkpoint, version, 128)
    path = save(checkpoint, tmp_path / "gpt2.bin", "llmc")
    assert path.read_bytes() == expected
    assert same_bits(load(path), checkpoint)


def test_llmc_size_of_the_124m_release() -> None:
    # gpt2_124M.bin has 497,904,640 bytes and 124,475,904 parameters, padding included
    shapes = parameter_shapes(GPTConfig(vocab_size=50304))
    assert sum(np.prod(shape) for shape in shapes.values()) == 124_475_904
    assert 1024 + 4 * 124_475_904 == 497_904_640


def test_run_folder_gives_its_best_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load(run)
    dtypes = {900: torch.float32, 1000: torch.bfloat16, 1100: torch.float16}
    for step, dtype in dtypes.items():
        save(random_checkpoint(TINY, dtype), tmp_path / str(step), "fastgpt2")
        folder = run / f"checkpoints/step_{step:08}"
        (tmp_path / str(step) / "checkpoints/step_00000000").rename(folder)
    (run / "checkpoints/.step_00002000.tmp").mkdir()
    (run / "checkpoints/step_00003000").mkdir()
    # no loss was measured: the newest that is whole
    assert load(run).dtype == torch.float16
    for step, loss in ((900, 4.0), (1000, 3.0), (1100, None)):
        state = {"step": step, "val_loss": loss}
        path = run / f"checkpoints/step_{step:08}/state.json"
        path.write_text(json.dumps(state), "utf-8")
    assert load(run).dtype == torch.bfloat16
    assert load(run / "checkpoints/step_00000900").dtype == torch.float32
    # a file of weights stands for its folder
    assert load(run / "checkpoints/step_00000900/model.safetensors").dtype == torch.float32


def test_every_field_of_the_configuration_is_kept_in_our_folder(tmp_path: Path) -> None:
    config = replace(TINY, dropout=0.2, embd_dropout=0.0, impl="torch", fp32_residual=True)
    folder = save(random_checkpoint(config), tmp_path / "x", "fastgpt2")
    assert load(folder).config == config
    path = folder / "checkpoints/step_00000000/gpt_config.json"
    path.write_text(path.read_text("utf-8").replace("n_head", "n_heads"), "utf-8")
    with pytest.raises(UserError, match="unknown key 'n_heads'; did you mean 'n_head'"):
        load(folder)


def test_saving_replaces_nothing(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(TINY)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x", "utf-8")
    (tmp_path / "mine.pt").write_text("x", "utf-8")
    with pytest.raises(UserError, match="exists already and is not empty"):
        save(checkpoint, tmp_path / "full", "hf")
    with pytest.raises(UserError, match="exists already"):
        save(checkpoint, tmp_path / "mine.pt", "nanogpt")
    (tmp_path / "empty").mkdir()
    save(checkpoint, tmp_path / "empty", "hf")
    assert same_bits(load(tmp_path / "empty"), checkpoint)


@pytest.mark.parametrize("format", FORMATS)
def test_failed_saving_leaves_nothing(tmp_path: Path, format: str) -> None:
    checkpoint = random_checkpoint(TINY)

    def fail() -> torch.Tensor:
        raise UserError("the values have a wrong CRC")

    name = "transformer.ln_f.bias"
    tensors = {**checkpoint.tensors, name: replace(checkpoint.tensors[name], read=fail)}
    with pytest.raises(UserError, match="wrong CRC"):
        save(replace(checkpoint, tensors=tensors), tmp_path / "x", format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x", "x.pt"])
def test_place_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(UserError, match=f"file/{name}: cannot be written: File exists"):
        save(random_checkpoint(TINY), tmp_path / "file" / name, "nanogpt")


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no model found"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello", "utf-8")
    with pytest.raises(UserError, match=r"notes.txt: neither"):
        load(tmp_path / "notes.txt")
