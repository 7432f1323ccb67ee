"""Damaged and hostile files: one clear line that names the file, and nothing else happens."""

import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.weights import FORMATS, load, save
from fastgpt2.weights.safetensors_file import read_safetensors
from fastgpt2.weights.sstable import read_table, write_table
from tests.weights.conftest import random_checkpoint

TINY = GPTConfig(block_size=8, vocab_size=17, n_layer=1, n_head=2, n_embd=8)
ROUNDS = 150


def read_all(path: Path) -> None:
    for tensor in load(path).state_dict().values():
        tensor.sum()


def refused(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_all(path)
    assert "\n" not in str(error.value)
    assert str(path if path.is_dir() else path.parent) in str(error.value)


def damage(data: bytes, header: int, rng: random.Random) -> bytes:
    """One of the accidents of files: a flipped bit, a cut, a hole, doubled or inserted bytes."""
    out = bytearray(data)
    at = rng.randrange(min(header, len(out)))
    kind = rng.randrange(6)
    if kind == 0:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del out[at:]
    elif kind == 2:
        del out[at : at + rng.randrange(1, 9)]
    elif kind == 3:
        out[at:at] = out[at : at + rng.randrange(1, 65)]
    elif kind == 4:
        out[at : at + 8] = rng.choice([b"\xff" * 8, bytes(8), b"9" * 8, (2**62).to_bytes(8, "big")])
    else:
        out[at:at] = rng.randbytes(rng.randrange(1, 9))
    return bytes(out)


FILES = [
    ("hf", "config.json"),
    ("hf", "model.safetensors"),
    ("hf sharded", "model.safetensors.index.json"),
    ("hf bin", "pytorch_model.bin"),
    ("hf old bin", "pytorch_model.bin"),
    ("nanogpt", "ckpt.pt"),
    ("llmc", "model.bin"),
    ("openai", "hparams.json"),
    ("openai", "checkpoint"),
    ("openai", "model.ckpt.index"),
    ("openai", "model.ckpt.data-00000-of-00001"),
    ("fastgpt2", "checkpoints/step_00000000/gpt_config.json"),
    ("fastgpt2", "checkpoints/step_00000000/model.safetensors"),
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One good folder of every form."""
    base = tmp_path_factory.mktemp("originals")
    checkpoint = random_checkpoint(TINY)
    folders = {format: base / format for format in FORMATS}
    for format, folder in folders.items():
        save(checkpoint, folder, format)
    state = dict(load(folders["hf"]).state_dict())
    for i in range(TINY.n_layer):
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            key = f"transformer.h.{i}.{name}.weight"
            state[key] = state[key].t().contiguous()
    for form in ("hf sharded", "hf bin", "hf old bin"):
        folders[form] = base / form
        folders[form].mkdir()
        shutil.copy(folders["hf"] / "config.json", folders[form])
    torch.save(state, folders["hf bin"] / "pytorch_model.bin")
    old = folders["hf old bin"] / "pytorch_model.bin"
    torch.save(state, old, _use_new_zipfile_serialization=False)
    shutil.copy(folders["hf"] / "model.safetensors", folders["hf sharded"] / "a.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, "a.safetensors")}
    path = folders["hf sharded"] / "model.safetensors.index.json"
    path.write_text(json.dumps(index), "utf-8")
    for folder in folders.values():
        read_all(folder)
    return folders


@pytest.mark.parametrize(("form", "name"), FILES)
def test_damaged_files(originals: dict[str, Path], tmp_path: Path, form: str, name: str) -> None:
    folder = Path(shutil.copytree(originals[form], tmp_path / "x"))
    data = (folder / name).read_bytes()
    rng = random.Random(f"{form} {name}")
    headers = {"ckpt.pt": len(data), "pytorch_model.bin": len(data), "model.bin": 40}
    failures = 0
    for _ in range(ROUNDS):
        (folder / name).write_bytes(damage(data, headers.get(name, 1200), rng))
        try:
            read_all(folder)
        except UserError as error:
            failures += 1
            assert "\n" not in str(error)
            assert str(folder) in str(error)
    # the accidents are real: most of them are noticed wherever the format can notice
    assert failures > ROUNDS / 4


class Attack:
    """A pickle that makes a file when it is loaded by a careless reader."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.args


@pytest.mark.parametrize("form", ["nanogpt", "hf bin", "hf old bin"])
@pytest.mark.parametrize("where", ["value", "config"])
def test_code_in_pickles_is_never_run(
    originals: dict[str, Path], tmp_path: Path, form: str, where: str
) -> None:
    folder = Path(shutil.copytree(originals[form], tmp_path / "x"))
    path = next(folder.glob("*.pt" if form == "nanogpt" else "*.bin"))
    marker = tmp_path / "executed"
    content = torch.load(path, weights_only=True)
    attack = Attack(os.mkdir, str(marker))
    if where == "value":
        content["transformer.wte.weight"] = attack
    else:
        content["config"] = {"dataset": [attack]}
    torch.save(content, path, _use_new_zipfile_serialization=form != "hf old bin")
    # the attack works where weights are not all that is loaded
    torch.load(path, weights_only=False)
    assert marker.exists()
    marker.rmdir()
    refused(path, "refused: it asks for posix.mkdir, and could run code")
    assert not marker.exists()


def test_raw_pickle_and_other_things_called_ckpt(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    marker = tmp_path / "executed"
    path.write_bytes(pickle.dumps(Attack(os.mkdir, str(marker))))
    refused(path, "not a file of torch.save")
    assert not marker.exists()
    for data in (b"", b"PK\x03\x04", b"hello", bytes(100)):
        path.write_bytes(data)
        refused(path, "not a file of torch.save")
    torch.save([torch.zeros(3)], path)
    refused(path, "expected a dictionary of tensors by name")
    torch.save({"model": {}, "model_args": []}, path)
    refused(path, "'model_args' and 'model' must be dictionaries")


def test_sizes_that_only_a_bomb_has(originals: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    good = originals["nanogpt"] / "ckpt.pt"
    # zeros compress a thousandfold
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    refused(path, "is compressed: refused")
    for old_form in (False, True):
        content = {"model": {}, "config": Attack(bytearray, 2**40)}
        torch.save(content, path, _use_new_zipfile_serialization=not old_form)
        refused(path, "asks for a bytearray")


def test_tensors_that_share_their_bytes(originals: dict[str, Path], tmp_path: Path) -> None:
    # torch saves a view with strides of zero as it is: sixteen bytes could be a terabyte
    path = tmp_path / "ckpt.pt"
    content = torch.load(originals["nanogpt"] / "ckpt.pt", weights_only=True)
    wide = torch.zeros(1).expand(2**40)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        content["model"][name] = wide
    torch.save(content, path)
    refused(path, r"its tensors take \d{13} bytes, its files have \d{4}")
    torch.save(content, path, _use_new_zipfile_serialization=False)
    refused(path, "its tensors take")


def test_variables_that_share_their_bytes(openai_folder: Path) -> None:
    index = openai_folder / "model.ckpt.index"
    table = read_table(index.read_bytes())
    for name in ("attn/c_attn/w", "attn/c_proj/w", "mlp/c_fc/w", "mlp/c_proj/w"):
        table[f"model/h1/{name}".encode()] = table[f"model/h0/{name}".encode()]
    shard = openai_folder / "model.ckpt.data-00000-of-00001"
    index.write_bytes(write_table(table))
    read_all(openai_folder)
    # every value is still there, but the file could have been half as long
    shard.write_bytes(shard.read_bytes()[:-4])
    wte = table[b"model/wte"]
    table[b"model/wte"] = wte[: wte.index(b"\x20")] + b"\x28\x80\x84\x08" + wte[-5:]
    index.write_bytes(write_table(table))
    refused(openai_folder, "its tensors take 1751552 bytes, its files have 1751548")


def safetensors_file(
    path: Path, header: object, data: bytes = b"", size: int | None = None
) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


def test_safetensors_headers(originals: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(originals["hf"], tmp_path / "x"))
    path = folder / "model.safetensors"

    def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
        return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}

    safetensors_file(path, {}, size=2**63)
    refused(path, "not a safetensors file")
    safetensors_file(path, {}, size=10**8 - 1)
    refused(path, "not a safetensors file")
    safetensors_file(path, entry([2**40], [0, 2**42]), b"1234")
    refused(path, "not a safetensors file")
    safetensors_file(path, entry([2**62, 4, 4], [0, 4]), b"1234")
    refused(path, "not a safetensors file")
    safetensors_file(path, entry([1], [4, 0]), b"1234")
    refused(path, "not a safetensors file")
    safetensors_file(path, entry([1], [0, 4], "F77"), b"1234")
    refused(path, "not a safetensors file")
    safetensors_file(path, entry([4], [0, 4], "F8_E4M3"), b"1234")
    refused(path, "'w' has dtype F8_E4M3, not supported")
    safetensors_file(path, entry([1], [0, 4], "I32"), b"1234")
    refused(path, "n_layer|missing")
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"none of model\.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "/etc/passwd", "..", "", "x/../../y", "a\\b", "C:a", "a\0b", 5, None],
)
def test_shards_outside_the_folder(originals: dict[str, Path], tmp_path: Path, name: Any) -> None:
    folder = Path(shutil.copytree(originals["hf sharded"], tmp_path / "x"))
    shutil.copy(folder / "a.safetensors", tmp_path / "a.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text("utf-8"))
    index["weight_map"]["transformer.wte.weight"] = name
    path.write_text(json.dumps(index), "utf-8")
    refused(path, "is not the name of a file in this folder")


def test_shard_that_lacks_its_tensor(originals: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(originals["hf sharded"], tmp_path / "x"))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text("utf-8"))
    index["weight_map"]["more"] = "a.safetensors"
    path.write_text(json.dumps(index), "utf-8")
    refused(path, "a.safetensors: missing 'more', which model.safetensors.index.json places there")
    index["weight_map"]["more"] = "b.safetensors"
    path.write_text(json.dumps(index), "utf-8")
    refused(path, "b.safetensors: No such file")
    path.write_text('{"weight_map": []}', "utf-8")
    refused(path, "'weight_map' must name the file of each tensor")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b"[" * 100_000, "not JSON|nested too deeply"),
        (b'{"n_layer": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"{} {}", "not JSON"),
        (b" " * (17 << 20), "more than 16777216 bytes of JSON"),
    ],
)
@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("hf", "config.json"),
        ("openai", "hparams.json"),
        ("fastgpt2", "checkpoints/step_00000000/gpt_config.json"),
    ],
)
def test_json_that_is_none(
    originals: dict[str, Path], tmp_path: Path, form: str, name: str, text: bytes, message: str
) -> None:
    folder = Path(shutil.copytree(originals[form], tmp_path / "x"))
    (folder / name).write_bytes(text)
    refused(folder, message)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 1, "neither a ckpt.pt of nanoGPT nor a .bin of llm.c"),
        (1, 4, "version 4 of llm.c's format"),
        (4, 16_384, "bytes, the header asks for"),
        (4, 2**31 - 1, "n_layer must be at most 16,384, got 2147483647"),
        (6, 2**31 - 2, "bytes, the header asks for"),
        (3, 0, "vocab_size must be a positive integer, got 0"),
        (3, -1, "vocab_size must be a positive integer, got -1"),
        (5, 3, "n_embd must be a multiple of n_head"),
        (7, 16, "padded vocabulary 16 is less than 17"),
        (7, 256, "bytes, the header asks for"),
    ],
)
def test_llmc_headers(
    originals: dict[str, Path], tmp_path: Path, at: int, value: int, message: str
) -> None:
    data = (originals["llmc"] / "model.bin").read_bytes()
    header = np.frombuffer(data[:1024], "<i4").copy()
    header[at] = value
    path = tmp_path / "model.bin"
    path.write_bytes(header.tobytes() + data[1024:])
    refused(path, message)


def test_llmc_cut(originals: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    data = (originals["llmc"] / "model.bin").read_bytes()
    path.write_bytes(data[:1000])
    refused(path, "truncated: 1000 bytes, the header takes 1024")
    path.write_bytes(data[:-1])
    refused(path, f"{len(data) - 1} bytes, the header asks for {len(data)}")
    path.write_bytes(data + b"x")
    refused(path, f"{len(data) + 1} bytes, the header asks for {len(data)}")


def test_file_that_shrinks_after_it_was_opened(originals: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(originals["llmc"] / "model.bin", tmp_path / "model.bin"))
    state = load(path).state_dict()
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"model.bin: cannot map"):
        dict(state)
    path.unlink()
    with pytest.raises(UserError, match=r"model.bin: cannot map"):
        dict(state)


def test_a_file_that_may_not_be_read(
    originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read all, so the refusal is played."""
    path = next(originals["fastgpt2"].rglob("*.safetensors"))

    def refuse(self: Path, *_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"safetensors: Permission denied$"):
        read_safetensors(path)
