import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastgpt2.errors import UserError
from fastgpt2.text.bpe import MIRRORS, SHA256, GPT2Tokenizer
from tests.loopback import Site, content
from tests.text.tiny import MERGES, tiny_files


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        # keyword names cannot hold a dot
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return folder


def test_all_kinds_of_model_folders_give_the_same(tmp_path: Path, tiny_gpt2: GPT2Tokenizer) -> None:
    encoder, merges = tiny_files()
    vocab = json.loads(encoder)
    end = vocab.pop("<|endoftext|>")
    added = [{"id": end, "content": "<|endoftext|>"}]
    for form in (MERGES, [merge.split() for merge in MERGES]):
        content_ = {"model": {"type": "BPE", "vocab": vocab, "merges": form}, "added_tokens": added}
        folder = tmp_path / f"json{len(form[0])}"
        folder.mkdir()
        write(folder, tokenizer_json=json.dumps(content_))
        assert GPT2Tokenizer.from_folder(folder).fingerprint == tiny_gpt2.fingerprint
    for names in (
        {"encoder_json": encoder, "vocab_bpe": merges},
        {"vocab_json": encoder, "merges_txt": merges},
    ):
        folder = tmp_path / next(iter(names))
        folder.mkdir()
        write(folder, **names)
        assert GPT2Tokenizer.from_folder(folder).fingerprint == tiny_gpt2.fingerprint


def test_windows_line_ends_and_a_missing_version_line(tiny_gpt2: GPT2Tokenizer) -> None:
    encoder, merges = tiny_files()
    for other in (merges.replace("\n", "\r\n"), merges.split("\n", 1)[1]):
        assert GPT2Tokenizer(encoder, other).fingerprint == tiny_gpt2.fingerprint


def test_end_of_text_may_come_first() -> None:
    encoder, merges = tiny_files()
    vocab = json.loads(encoder)
    end = vocab.pop("<|endoftext|>")
    moved = {"<|endoftext|>": 0} | {token: id_ + 1 for token, id_ in vocab.items()}
    tokenizer = GPT2Tokenizer(json.dumps(moved), merges)
    assert (tokenizer.eot, tokenizer.vocab_size) == (0, end + 1)
    assert tokenizer.decode(tokenizer.encode("the end")) == "the end"


def test_vocabulary_without_end_of_text() -> None:
    encoder, merges = tiny_files()
    vocab = json.loads(encoder)
    del vocab["<|endoftext|>"]
    assert GPT2Tokenizer(json.dumps(vocab), merges).eot is None


def change(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda vocab: vocab.__setitem__(key, value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda vocab: vocab.pop("a"), "ids are not 0 to"),
        (change("a", 7), "ids are not 0 to"),
        (change("a", "7"), "ids are not 0 to"),
        (change("a", -1), "ids are not 0 to"),
        (lambda v: v.update({"x": v.pop("the")}), "ids are not 0 to"),
        (lambda v: v.update({"xyz": v.pop("the")}), "'the' has no id"),
        (lambda v: v.update({"xyz": v.pop("a")}), "'a' has no id"),
        (lambda v: v.update(the=v["th"], th=v["the"]), "breaks the order of the merges"),
    ],
)
def test_damaged_vocabulary(damage: Callable[[dict[str, Any]], None], message: str) -> None:
    encoder, merges = tiny_files()
    vocab = json.loads(encoder)
    damage(vocab)
    with pytest.raises(UserError, match=message):
        GPT2Tokenizer(json.dumps(vocab), merges)


@pytest.mark.parametrize("merges", ["日 本", "x y"])
def test_merges_of_another_vocabulary(merges: str) -> None:
    vocab = json.loads(tiny_files()[0]) | {"日本": 267}
    with pytest.raises(UserError, match="do not belong together"):
        GPT2Tokenizer(json.dumps(vocab), merges)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[]", "expected a JSON object, got list")]
)
def test_encoder_that_is_not_json(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, encoder_json=text, vocab_bpe="")
    with pytest.raises(UserError, match=rf"encoder\.json.*{message}"):
        GPT2Tokenizer.from_folder(tmp_path)


def test_tokenizer_json_of_another_kind(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_json='{"model": {"type": "Unigram", "vocab": []}}')
    with pytest.raises(UserError, match="not a BPE tokenizer"):
        GPT2Tokenizer.from_folder(tmp_path)


def test_vocabulary_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "encoder.json").write_bytes(b'{"\xff": 0}')
    (tmp_path / "vocab.bpe").write_bytes(b"")
    with pytest.raises(UserError, match=r"encoder\.json: not UTF-8 at byte 2"):
        GPT2Tokenizer.from_folder(tmp_path)


def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Make the tiny vocabulary the one that is expected everywhere."""
    files = dict(zip(SHA256, (text.encode("utf-8") for text in tiny_files()), strict=True))
    for name, data in files.items():
        monkeypatch.setitem(SHA256, name, hashlib.sha256(data).hexdigest())
    return files


def test_network_is_the_last_way_and_is_kept(
    offline: None, site: Site, monkeypatch: pytest.MonkeyPatch, tiny_gpt2: GPT2Tokenizer
) -> None:
    mirrors = {
        name: (site.add(f"/{name}", content(data)),)
        for name, data in published(monkeypatch).items()
    }
    monkeypatch.setattr("fastgpt2.text.bpe.MIRRORS", mirrors)
    assert GPT2Tokenizer.load().fingerprint == tiny_gpt2.fingerprint
    assert [path for path, _ in site.asked] == ["/encoder.json", "/vocab.bpe"]
    assert GPT2Tokenizer.load().fingerprint == tiny_gpt2.fingerprint
    assert len(site.asked) == 2


def test_tiktokens_cache_comes_before_the_network(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_gpt2: GPT2Tokenizer
) -> None:
    cache = tmp_path / "tiktoken"
    cache.mkdir()
    for name, data in published(monkeypatch).items():
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        (cache / hashlib.sha1(url.encode("utf-8")).hexdigest()).write_bytes(data)
    assert GPT2Tokenizer.load().fingerprint == tiny_gpt2.fingerprint
    # tiktoken's older name for the variable
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(cache))
    assert GPT2Tokenizer.load().fingerprint == tiny_gpt2.fingerprint
    # a damaged cache is not used
    next(cache.iterdir()).write_bytes(b"damaged")
    with pytest.raises(UserError, match="no GPT-2 vocabulary"):
        GPT2Tokenizer.load()


def test_the_mirrors_are_of_openai_and_hugging_face() -> None:
    assert all(url.startswith("https://") for urls in MIRRORS.values() for url in urls)
    assert set(MIRRORS) == set(SHA256)
