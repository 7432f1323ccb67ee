import json
from pathlib import Path

import numpy as np
import pytest

from fastgpt2.errors import UserError
from fastgpt2.prepare import prepare
from fastgpt2.text import (
    BytesTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    TokenShards,
    build_dataset,
    save_tokenizer,
)
from fastgpt2.text.encoding import END_OF_TEXT
from tests.text.tiny import BESIDE_THE_REPOSITORY

TEXT = "".join(f"the {i} and é\n" for i in range(500))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three documents, the last one longer than the validation split."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, text in {"a.txt": "first\n", "b.txt": "second\n", "c.txt": TEXT}.items():
        (texts / name).write_bytes(text.encode("utf-8"))
    return texts


def test_characters_of_one_file_as_nanogpt_prepares_them(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "".join(chr(32 + i * i % 90) for i in range(1000))
    path.write_text(text, encoding="utf-8")
    data = build_dataset(str(path), "char")
    ids = {char: i for i, char in enumerate(sorted(set(text)))}
    assert data.val is not None
    assert data.train[:].tolist() == [ids[char] for char in text[:900]]
    assert data.val[:].tolist() == [ids[char] for char in text[900:]]
    assert (data.train_bytes, data.val_bytes, data.source) == (900, 100, str(path))
    assert data.train.dtype == np.uint16


def test_every_document_ends_with_end_of_text(folder: Path) -> None:
    data = build_dataset(str(folder), "bytes")
    assert data.val is not None
    eot = data.tokenizer.eot
    expected = [*b"first\n", eot, *b"second\n", eot, *TEXT.encode("utf-8"), eot]
    assert [*data.train[:].tolist(), *data.val[:].tolist()] == expected
    assert data.train_bytes + data.val_bytes == len(expected) - 3
    assert abs(data.val_bytes - 0.1 * (len(expected) - 3)) < 4


def test_without_an_end_of_text_documents_follow_each_other(folder: Path) -> None:
    data = build_dataset(str(folder), "char", val_fraction=0.0)
    assert data.tokenizer.decode(data.train[:].tolist()) == "first\nsecond\n" + TEXT
    assert data.val is None and data.val_bytes == 0


def test_a_tokenizer_can_be_given(folder: Path, tiny_gpt2: GPT2Tokenizer) -> None:
    data = build_dataset([str(folder / "c.txt")], tiny_gpt2)
    assert data.tokenizer is tiny_gpt2
    assert data.val is not None
    ids = [*data.train[:].tolist(), *data.val[:].tolist()]
    assert tiny_gpt2.decode(ids) == TEXT + END_OF_TEXT


def test_offline_auto_says_what_it_does(folder: Path, offline: None) -> None:
    said: list[str] = []
    assert build_dataset(str(folder), notify=said.append).tokenizer.name == "bytes"
    assert len(said) == 1


def test_the_verdict_has_5145_tokens_and_ends(gpt2: GPT2Tokenizer) -> None:
    path = BESIDE_THE_REPOSITORY / "data" / "the-verdict.txt"
    if not path.is_file():
        pytest.skip("no copy of the-verdict beside the repository")
    tokens = build_dataset(str(path), gpt2, val_fraction=0.0).train[:]
    assert len(tokens) == 5145 + 1 and tokens[-1] == gpt2.eot


def test_token_shards_hold_the_same_as_the_text(folder: Path, tmp_path: Path) -> None:
    prepare([str(folder)], tmp_path / "out", tokenizer="bytes", shard_tokens=1000)
    shards = build_dataset(str(tmp_path / "out"))
    text = build_dataset(str(folder), "bytes")
    assert isinstance(shards.train, TokenShards) and shards.val is not None
    assert text.val is not None
    assert np.array_equal(shards.train[:], text.train[:])
    assert np.array_equal(shards.val[:], text.val[:])
    assert (shards.train_bytes, shards.val_bytes) == (text.train_bytes, text.val_bytes)
    assert shards.tokenizer.fingerprint == text.tokenizer.fingerprint
    assert shards.source == str(tmp_path / "out")


@pytest.fixture
def prepared(folder: Path, tmp_path: Path) -> Path:
    prepare([str(folder)], tmp_path / "out", tokenizer="bytes", shard_tokens=5000)
    return tmp_path / "out"


def test_shards_of_another_tokenizer_are_refused(prepared: Path) -> None:
    with pytest.raises(UserError, match=r"was made with the tokenizer bytes \w+, not with gpt2"):
        build_dataset(str(prepared), "gpt2")
    with pytest.raises(UserError, match="not with char"):
        build_dataset(str(prepared), CharTokenizer("ab"))
    assert build_dataset(str(prepared), BytesTokenizer()).tokenizer.name == "bytes"


def test_shards_are_given_alone_and_by_their_folder(prepared: Path) -> None:
    with pytest.raises(UserError, match="holds token shards; give it alone"):
        build_dataset(["python-docs", str(prepared)])
    with pytest.raises(UserError, match="is one token shard; give the folder it is in"):
        build_dataset(str(prepared / "train-00000.tokens"))


def test_a_missing_shard_is_named(prepared: Path) -> None:
    (prepared / "train-00000.tokens").unlink()
    with pytest.raises(UserError, match=r"train-00000\.tokens: cannot be read: No such file"):
        build_dataset(str(prepared))


def test_damaged_ids_are_found_before_training(prepared: Path) -> None:
    path = prepared / "train-00001.tokens"
    data = bytearray(path.read_bytes())
    data[1000:1002] = b"\xff\xff"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-00001\.tokens.*id 65535 at position 372 is not in"):
        build_dataset(str(prepared))
    data[1000:1002] = b"\x07\x00"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-00001\.tokens: expected sha256"):
        build_dataset(str(prepared))


def change_manifest(folder: Path, *keys: str, value: object) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    place = manifest
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("format",), "other", "expected format 'fastgpt2-tokens', got 'other'"),
        (("splits",), {}, "no training tokens"),
        (("splits",), [], "damaged manifest"),
        (("splits", "train", "tokens"), 3, r"train has \d+ tokens, recorded are 3"),
        (("splits", "train", "tokens"), None, "damaged manifest"),
        (("splits", "train", "files"), [], "no files given"),
    ],
)
def test_damaged_manifest(
    prepared: Path, keys: tuple[str, ...], value: object, message: str
) -> None:
    change_manifest(prepared, *keys, value=value)
    with pytest.raises(UserError, match=message):
        build_dataset(str(prepared))


def test_manifest_that_is_not_json(prepared: Path) -> None:
    (prepared / "manifest.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match="damaged manifest"):
        build_dataset(str(prepared))


def test_tokenizer_that_is_not_the_shards(prepared: Path) -> None:
    save_tokenizer(CharTokenizer("ab"), prepared)
    with pytest.raises(UserError, match=r"the shards of train are of tokenizer bytes .* is char"):
        build_dataset(str(prepared))
