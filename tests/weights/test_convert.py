import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt2.config import GPTConfig
from fastgpt2.convert import main
from fastgpt2.text import CharTokenizer, GPT2Tokenizer, load_tokenizer, save_tokenizer
from fastgpt2.weights import FORMATS, load, save
from tests.text.tiny import tiny_files
from tests.weights.conftest import random_checkpoint, same_bits

ENCODER, MERGES = tiny_files()
VOCAB = len(json.loads(ENCODER))
CONFIG = GPTConfig(block_size=16, vocab_size=VOCAB, n_layer=1, n_head=2, n_embd=8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A release in OpenAI's format, with a vocabulary."""
    folder = save(random_checkpoint(CONFIG), tmp_path / "124M", "openai")
    (folder / "encoder.json").write_text(ENCODER, "utf-8")
    (folder / "vocab.bpe").write_text(MERGES, "utf-8")
    return folder


def converted(capsys: pytest.CaptureFixture[str], *argv: object) -> list[str]:
    assert main([str(argument) for argument in argv]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    lines = converted(capsys, source, there, "--to", format)
    # nanoGPT computes another GELU
    assert [line[:29] for line in lines[:-1]] == (
        ["the model has the tanh GELU, "] if format == "nanogpt" else []
    )
    assert lines[-1].startswith(f"{source} -> {there}")
    assert lines[-1].endswith(f"({format}, 3,152 parameters)")
    lines = converted(capsys, there, back, "--to", "openai")
    names = {path.name for path in source.iterdir()}
    if FORMATS[format].file is not None:
        # single files bring no vocabulary
        assert lines[0].startswith("no tokenizer written: ")
        names -= {"encoder.json", "vocab.bpe"}
    assert {path.name for path in back.iterdir()} == names
    for name in names:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name


def test_tokenizer_of_the_run_folder(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted(capsys, source, tmp_path / "run", "--to", "fastgpt2")
    tokenizer = load_tokenizer(tmp_path / "run")
    assert tokenizer.encode("the") == GPT2Tokenizer.from_folder(source).encode("the")
    # a checkpoint of the run finds it too
    step = tmp_path / "run" / "checkpoints" / "step_00000000"
    assert len(converted(capsys, step, tmp_path / "openai", "--to", "openai")) == 1
    assert (tmp_path / "openai" / "encoder.json").read_text("utf-8") == ENCODER


def test_generation_runs_from_a_converted_folder(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastgpt2.generate.__main__ import main as generate

    converted(capsys, source, tmp_path / "run", "--to", "fastgpt2")
    flags = ["--max-new-tokens", "3", "--device", "cpu", "--prompt", "the"]
    assert generate(["--run", str(tmp_path / "run"), *flags]) == 0
    assert capsys.readouterr().out.startswith("the")


def test_transformers_finds_the_tokenizer(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    converted(capsys, source, tmp_path / "hf", "--to", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = GPT2Tokenizer.from_folder(source)
    assert theirs.encode(" the cat and") == ours.encode(" the cat and")
    # what transformers itself saves (one tokenizer.json) comes back as the two files
    theirs.save_pretrained(tmp_path / "hf2")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "hf" / name, tmp_path / "hf2" / name)
    converted(capsys, tmp_path / "hf2", tmp_path / "openai", "--to", "openai")
    assert GPT2Tokenizer.from_folder(tmp_path / "openai").fingerprint == ours.fingerprint
    # between two of their folders the files are copied as they are
    converted(capsys, tmp_path / "hf2", tmp_path / "hf3", "--to", "hf")
    for path in (tmp_path / "hf2").glob("*token*"):
        assert (tmp_path / "hf3" / path.name).read_bytes() == path.read_bytes()


def test_hugging_face_to_hugging_face_keeps_the_other_options(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted(capsys, source, tmp_path / "hf", "--to", "hf")
    options = {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5, "summary_type": "mean"}
    config = json.loads((tmp_path / "hf" / "config.json").read_text("utf-8")) | options
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config), "utf-8")
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": 4}', "utf-8")
    flags = ("--to", "hf", "--dtype", "bfloat16")
    converted(capsys, tmp_path / "hf", tmp_path / "hf2", *flags)
    found = json.loads((tmp_path / "hf2" / "config.json").read_text("utf-8"))
    assert found == config | {"torch_dtype": "bfloat16"}
    generation = (tmp_path / "hf2" / "generation_config.json").read_text("utf-8")
    assert json.loads(generation) == {"eos_token_id": 4}


def test_tokenizer_that_other_programs_do_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(random_checkpoint(CONFIG), tmp_path / "run", "fastgpt2")
    save_tokenizer(CharTokenizer.from_text("hello"), tmp_path / "run")
    lines = converted(capsys, tmp_path / "run", tmp_path / "hf", "--to", "hf")
    assert lines[0] == "no tokenizer written: format hf has no tokenizer 'char'"
    assert not (tmp_path / "hf" / "vocab.json").exists()
    converted(capsys, tmp_path / "run", tmp_path / "copy", "--to", "fastgpt2")
    assert load_tokenizer(tmp_path / "copy").decode([0]) == "e"


def test_dtype_and_files(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpt2_bf16.bin"
    converted(capsys, source, path, "--to", "llmc", "--dtype", "bfloat16")
    assert same_bits(load(path), load(source).to(torch.bfloat16))
    converted(capsys, path, tmp_path / "ckpt.pt", "--to", "nanogpt")
    assert same_bits(load(path), load(tmp_path / "ckpt.pt"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere", "x", "--to", "hf"], "nowhere: no such file or folder, and not one of gpt2,"),
        (["SRC", "SRC", "--to", "hf"], "exists already and is not empty"),
        (["SRC", "x", "--to", "openai", "--dtype", "float16"], "format openai holds float32"),
        (["gpt2-xl", "x", "--to", "hf", "--offline"], "gpt2-xl is not in the cache"),
        (["SRC", "x", "--to", "onnx"], "argument --to: invalid choice: 'onnx'"),
        (["SRC", "x"], "the following arguments are required: --to"),
    ],
)
def test_mistakes_take_one_line_and_exit_with_2(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path / "cache"))
    try:
        code: object = main([str(source) if word == "SRC" else word for word in argv])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    output = capsys.readouterr()
    assert output.out == ""
    line = output.err.splitlines()[-1]
    assert line.startswith("fastgpt2 convert: error: ")
    assert message in line
    assert not (tmp_path / "x").exists()


def test_damage_found_on_the_way_leaves_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard: Any = source / "model.ckpt.data-00000-of-00001"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main([str(source), str(tmp_path / "x"), "--to", "hf"]) == 2
    assert "'model/wte' have a wrong CRC-32C" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["124M"]
