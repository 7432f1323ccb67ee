"""Files that somebody made to do harm: they are refused by the command in one line, with code 2."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgpt2.config import GPTConfig
from fastgpt2.convert import main
from fastgpt2.errors import UserError
from fastgpt2.weights import FORMATS, load, save
from fastgpt2.weights.protobuf import write_field
from fastgpt2.weights.sstable import read_table, write_table
from tests.weights.conftest import GOLDEN, random_checkpoint

TINY = GPTConfig(block_size=8, vocab_size=17, n_layer=1, n_head=2, n_embd=8)
GPT_CONFIG = "checkpoints/step_00000000/gpt_config.json"
WEIGHTS = "checkpoints/step_00000000/model.safetensors"
fuzzed = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One good model in every format."""
    base = tmp_path_factory.mktemp("originals")
    return {
        format: _folder(save(random_checkpoint(TINY), base / format, format)) for format in FORMATS
    }


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def survives(path: Path) -> None:
    """Reading ``path`` succeeds, or fails in one short line that names it."""
    try:
        for tensor in load(path).state_dict().values():
            tensor.sum()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        assert str(path) in str(error)


def refused(path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the command refuses ``path``."""
    assert main([str(path), str(out), "--to", "fastgpt2"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and len(printed.err) < 2000
    assert not out.exists()
    return printed.err


VALUES = (
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 10**400, 10**4000])
    | st.text(max_size=9)
    | st.just("x" * 3000)
    | st.recursive(st.just(0), lambda inner: st.lists(inner, max_size=2), max_leaves=3)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)


@pytest.mark.parametrize(
    ("form", "name"), [("hf", "config.json"), ("openai", "hparams.json"), ("fastgpt2", GPT_CONFIG)]
)
def test_values_of_any_kind_in_json(
    originals: dict[str, Path], tmp_path: Path, form: str, name: str
) -> None:
    folder = Path(shutil.copytree(originals[form], tmp_path / "x"))
    good = json.loads((folder / name).read_text("utf-8"))
    keys = [*good, "n_inner", "dropout", "attn_pdrop", "quantization_config"]

    @fuzzed
    @given(st.dictionaries(st.sampled_from(keys), VALUES, min_size=1, max_size=2))
    def check(changes: dict[str, Any]) -> None:
        (folder / name).write_text(json.dumps(good | changes), "utf-8")
        survives(folder)

    check()


def test_index_entries_of_any_kind_behind_right_checksums(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "x"))
    index = folder / "model.ckpt.index"
    good = read_table(index.read_bytes())
    numbers = st.sampled_from([0, 1, 2, 3, 127, 128, 2**31, 2**63, 2**64 - 1])
    dims = numbers.map(lambda size: write_field(2, write_field(1, size)))
    values = numbers | st.binary(max_size=9) | st.lists(dims, max_size=9).map(b"".join)
    fields = st.builds(write_field, st.sampled_from([1, 2, 3, 4, 5, 6, 7, 99]), values)
    messages = st.lists(fields, max_size=7).map(b"".join)

    @fuzzed
    @given(st.sampled_from(list(good)), messages, st.booleans())
    def check(key: bytes, message: bytes, appended: bool) -> None:
        table = good | {key: good[key] + message if appended else message}
        index.write_bytes(write_table(table))
        survives(folder)

    check()


ENTRY = st.sampled_from(["dtype", "shape", "data_offsets"])


def test_safetensors_headers_of_any_kind(originals: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(originals["hf"], tmp_path / "x"))
    data = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    good = json.loads(data[8:end])
    odd = st.sampled_from(["F16", "X", [], [2**63], [-1], [0, 4], [4, 0], 2**70, "\n\x1b[31m"])

    @fuzzed
    @given(st.sampled_from(sorted(good)), ENTRY, odd | VALUES, st.booleans())
    def check(name: str, field: str, value: Any, renamed: bool) -> None:
        header = json.loads(json.dumps(good))
        header[name][field] = value
        if renamed:
            header["evil\n\x1b[31m" + "x" * 5000] = header.pop(name)
        text = json.dumps(header).encode()
        changed = len(text).to_bytes(8, "little") + text + data[end:]
        (folder / "model.safetensors").write_bytes(changed)
        survives(folder)

    check()


def nested(pair: Callable[[Any], Any]) -> Any:
    """2^40 leaves in forty objects: whoever prints or copies it never ends."""
    value: Any = pair(0)
    for _ in range(40):
        value = pair(value)
    return value


PICKLED: dict[str, Any] = {
    "list in lists": nested(lambda x: [x, x]),
    "dictionary in dictionaries": nested(lambda x: {"a": x, "b": x}),
    "integer too long to print": 10**5000,
    "tensor": torch.tensor(17),
    "tensor of many": torch.zeros(3),
    "NaN": math.nan,
    "text": "x" * 10**6,
}


@pytest.mark.parametrize("value", PICKLED.values(), ids=PICKLED)
@pytest.mark.parametrize("key", ["vocab_size", "n_layer", "dropout", "bias"])
def test_pickled_arguments_of_any_kind(
    originals: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    key: str,
    value: Any,
) -> None:
    path = tmp_path / "ckpt.pt"
    content = torch.load(originals["nanogpt"] / "ckpt.pt", weights_only=True)
    torch.save(content | {"model_args": content["model_args"] | {key: value}}, path)
    assert str(path) in refused(path, tmp_path / "out", capsys)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before zip"])
@pytest.mark.parametrize(
    "value", [*PICKLED.values(), torch.zeros(17, 8).to_sparse()], ids=[*PICKLED, "sparse"]
)
def test_pickled_weights_of_any_kind(
    originals: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    value: Any,
    old: bool,
) -> None:
    path = tmp_path / "ckpt.pt"
    content = torch.load(originals["nanogpt"] / "ckpt.pt", weights_only=True)
    content["model"]["transformer.wte.weight"] = content["model"]["lm_head.weight"] = value
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    assert str(path) in refused(path, tmp_path / "out", capsys)


PLACES = [
    ("hf", "config.json"),
    ("hf", "model.safetensors"),
    ("openai", "hparams.json"),
    ("openai", "checkpoint"),
    ("openai", "model.ckpt.index"),
    ("openai", "model.ckpt.data-00000-of-00001"),
    ("nanogpt", "ckpt.pt"),
    ("llmc", "model.bin"),
    ("fastgpt2", GPT_CONFIG),
    ("fastgpt2", WEIGHTS),
]


@pytest.mark.skipif(os.name == "nt", reason="neither pipes nor devices in folders there")
@pytest.mark.parametrize("kind", ["endless device", "pipe", "loop of links"])
@pytest.mark.parametrize(("form", "name"), PLACES)
def test_what_is_no_file_is_not_read(
    originals: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    form: str,
    name: str,
    kind: str,
) -> None:
    folder = Path(shutil.copytree(originals[form], tmp_path / "x"))
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "endless device" else path.name)
    if name == "checkpoint":
        # without it the one index there is counts
        survives(folder)
    else:
        assert str(folder) in refused(folder, tmp_path / "out", capsys)
