import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from fastgpt2.errors import UserError
from fastgpt2.text import (
    BytesTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    get_tokenizer,
    load_tokenizer,
    save_tokenizer,
)
from tests.loopback import Site
from tests.text.tiny import tiny_files

# any text that UTF-8 can carry, with more of what tokenizers trip over
TEXT = st.text() | st.lists(
    st.sampled_from(
        ["the", " the", " ", "\n", "\t", "'s", "<|endoftext|>", "é", "日本", "👩‍👩‍👧", "\0", "12"]
    )
).map("".join)


@given(text=TEXT)
def test_bytes_round_trip(text: str) -> None:
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text, allow_special=True)) == text


@given(text=TEXT)
def test_gpt2_round_trip(text: str, tiny_gpt2: GPT2Tokenizer) -> None:
    for allow_special in (False, True):
        ids = tiny_gpt2.encode(text, allow_special=allow_special)
        assert tiny_gpt2.decode(ids) == text
        assert tiny_gpt2.decode_bytes(ids) == text.encode("utf-8")


@given(text=TEXT)
def test_real_gpt2_round_trip(text: str, gpt2: GPT2Tokenizer) -> None:
    assert gpt2.decode(gpt2.encode(text)) == text


@given(text=TEXT.filter(bool), data=st.data())
def test_char_round_trip(text: str, data: st.DataObject) -> None:
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.vocab_size == len(set(text))
    other = "".join(data.draw(st.lists(st.sampled_from(text))))
    ids = tokenizer.encode(other)
    assert max(ids, default=0) < tokenizer.vocab_size
    assert tokenizer.decode(ids) == other
    assert tokenizer.decode_bytes(ids) == other.encode("utf-8")


@given(text=st.text(min_size=1), cut=st.integers(0, 400))
def test_decoded_bytes_of_parts_join(text: str, cut: int, tiny_gpt2: GPT2Tokenizer) -> None:
    ids = tiny_gpt2.encode(text)
    parts = tiny_gpt2.decode_bytes(ids[:cut]) + tiny_gpt2.decode_bytes(ids[cut:])
    assert parts.decode("utf-8") == text


def test_gpt2_merges_by_hand(tiny_gpt2: GPT2Tokenizer) -> None:
    vocab = json.loads(tiny_files()[0])

    def ids(*tokens: str) -> list[int]:
        return [vocab[token] for token in tokens]

    assert tiny_gpt2.vocab_size == 256 + 10 + 1
    assert tiny_gpt2.encode("the the and") == ids("the", "Ġthe", "Ġand")
    # a word never takes more than one space before it
    assert tiny_gpt2.encode("in   the") == ids("in", "ĠĠ", "Ġthe")
    # "'s" is split off, and "thes" is one word
    assert tiny_gpt2.encode("the's thes") == ids("the", "'", "s", "Ġthe", "s")
    assert tiny_gpt2.encode("\n\nthe\n\n") == ids("Ċ", "Ċ", "the", "ĊĊ")
    assert tiny_gpt2.encode("é") == ids("Ã", "©")


def test_gpt2_ids_that_openai_published(gpt2: GPT2Tokenizer) -> None:
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)
    # from the GPT-2 documentation of Hugging Face
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(" Hello world") == [18435, 995]
    assert gpt2.fingerprint == "a5623714bcf19049"


@cache
def tiktokens_own() -> Any:
    return tiktoken.get_encoding("gpt2")


@given(text=TEXT)
def test_gpt2_equals_tiktoken(text: str, gpt2: GPT2Tokenizer) -> None:
    assert gpt2.encode(text) == tiktokens_own().encode_ordinary(text)


def test_end_of_text_is_plain_text_unless_asked(tiny_gpt2: GPT2Tokenizer) -> None:
    text = "a<|endoftext|>b"
    for tokenizer in (tiny_gpt2, BytesTokenizer(), CharTokenizer.from_text(text)):
        plain = tokenizer.encode(text)
        assert tokenizer.eot not in plain
        assert tokenizer.decode(plain) == text
    for special in (tiny_gpt2, BytesTokenizer()):
        ids = special.encode(text, allow_special=True)
        assert ids == [*special.encode("a"), special.eot, *special.encode("b")]
        assert special.decode(ids) == text


def test_char_has_no_end_of_text() -> None:
    assert CharTokenizer.from_text("ab").eot is None


def test_lone_surrogates_become_the_replacement_character(tiny_gpt2: GPT2Tokenizer) -> None:
    # what a terminal that is not UTF-8 puts into sys.argv
    for tokenizer in (tiny_gpt2, BytesTokenizer()):
        assert tokenizer.decode(tokenizer.encode("a\udcffb")) == "a\ufffdb"


def test_half_a_character_decodes_to_the_replacement_character() -> None:
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode("é")[:1]
    assert tokenizer.decode(ids) == "\ufffd"
    assert tokenizer.decode_bytes(ids) == b"\xc3"


def test_unknown_character_is_named() -> None:
    with pytest.raises(UserError, match=r"'é' \(U\+00E9\) at position 2 is not among the 2 char"):
        CharTokenizer.from_text("ab").encode("abé")


@pytest.mark.parametrize("id_", [-1, 257, 50300])
def test_id_outside_the_vocabulary_is_named(id_: int) -> None:
    with pytest.raises(UserError, match=rf"id {id_} is not in \[0, 257\)"):
        BytesTokenizer().decode([65, id_])


def test_id_outside_the_vocabulary_is_named_by_all(tiny_gpt2: GPT2Tokenizer) -> None:
    for tokenizer in (tiny_gpt2, CharTokenizer("ab")):
        for id_ in (-1, tokenizer.vocab_size):
            with pytest.raises(UserError, match=f"tokenizer {tokenizer.name}: id {id_} is not in"):
                tokenizer.decode([0, id_])


@pytest.mark.parametrize("chars", [[], ["a", "a"], ["ab"], [""]])
def test_char_vocabulary_must_be_characters(chars: list[str]) -> None:
    with pytest.raises(UserError, match="tokenizer char"):
        CharTokenizer(chars)


def test_fingerprint_tells_vocabularies_apart(tiny_gpt2: GPT2Tokenizer) -> None:
    all_of_them: list[Tokenizer] = [
        BytesTokenizer(),
        CharTokenizer("ab"),
        CharTokenizer("ba"),
        tiny_gpt2,
    ]
    marks = {tokenizer.fingerprint for tokenizer in all_of_them}
    assert len(marks) == 4
    assert all(len(mark) == 16 and int(mark, 16) >= 0 for mark in marks)
    assert CharTokenizer("ab").fingerprint == CharTokenizer(["a", "b"]).fingerprint


def every_tokenizer() -> list[Tokenizer]:
    return [BytesTokenizer(), CharTokenizer.from_text("añ日\n"), GPT2Tokenizer(*tiny_files())]


@pytest.mark.parametrize("tokenizer", every_tokenizer(), ids=lambda t: t.name)
def test_saved_tokenizer_works_offline(tokenizer: Tokenizer, tmp_path: Path, offline: None) -> None:
    save_tokenizer(tokenizer, tmp_path / "run")
    again = load_tokenizer(tmp_path / "run")
    assert type(again) is type(tokenizer)
    for key in ("name", "vocab_size", "eot", "fingerprint"):
        assert getattr(again, key) == getattr(tokenizer, key)
    assert again.encode("añ日\n") == tokenizer.encode("añ日\n")
    # Hugging Face's name stays free
    assert not (tmp_path / "run" / "tokenizer.json").exists()


def test_a_run_folder_is_a_vocabulary_folder(tmp_path: Path, tiny_gpt2: GPT2Tokenizer) -> None:
    save_tokenizer(tiny_gpt2, tmp_path)
    assert get_tokenizer("gpt2", vocab_dir=tmp_path).fingerprint == tiny_gpt2.fingerprint


def test_missing_saved_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer in this folder"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"name": "bytes"}', '{"name": 3}', "\xff"])
def test_damaged_saved_tokenizer(tmp_path: Path, text: str) -> None:
    (tmp_path / "fastgpt2_tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="damaged tokenizer file"):
        load_tokenizer(tmp_path)


def test_changed_vocabulary_is_refused(tmp_path: Path) -> None:
    save_tokenizer(CharTokenizer("ab"), tmp_path)
    path = tmp_path / "fastgpt2_tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"b"', '"c"'), encoding="utf-8")
    with pytest.raises(UserError, match="expected fingerprint"):
        load_tokenizer(tmp_path)


def test_unknown_name() -> None:
    with pytest.raises(UserError, match="unknown tokenizer 'gpt3'; known: gpt2, bytes, char, auto"):
        get_tokenizer("gpt3")


def test_char_needs_text() -> None:
    with pytest.raises(UserError, match="needs the text"):
        get_tokenizer("char")


def test_vocabulary_folder_is_for_gpt2(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokenizer bytes: a vocabulary folder is for gpt2"):
        get_tokenizer("bytes", vocab_dir=tmp_path)


def test_offline_gpt2_names_the_three_ways(offline: None) -> None:
    with pytest.raises(UserError) as caught:
        get_tokenizer("gpt2")
    message = str(caught.value)
    for way in ("--vocab-dir", "TIKTOKEN_CACHE_DIR", "network"):
        assert way in message
    assert "\n" not in message


def test_offline_auto_is_bytes_and_says_so(offline: None) -> None:
    said: list[str] = []
    assert get_tokenizer("auto", notify=said.append).name == "bytes"
    assert len(said) == 1 and said[0].startswith("tokenizer: bytes")


def test_auto_does_not_hang(offline: None, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = (site.add("/dead", site.hang),)
    monkeypatch.setattr("fastgpt2.text.bpe.MIRRORS", {"encoder.json": dead, "vocab.bpe": dead})
    monkeypatch.setattr("fastgpt2.text.tokenizers.AUTO_TIMEOUT", 0.2)
    start = time.monotonic()
    assert get_tokenizer("auto").name == "bytes"
    assert time.monotonic() - start < 2


def test_auto_takes_gpt2_when_it_can(tmp_path: Path, tiny_gpt2: GPT2Tokenizer) -> None:
    save_tokenizer(tiny_gpt2, tmp_path)
    said: list[str] = []
    assert get_tokenizer("auto", vocab_dir=tmp_path, notify=said.append).name == "gpt2"
    assert said == ["tokenizer: gpt2 (267 ids)"]


def test_auto_does_not_hide_a_wrong_vocabulary_folder(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"vocab_dir": tmp_path / "none"}
    for name in ("gpt2", "auto"):
        with pytest.raises(UserError, match=r"needs encoder\.json and vocab\.bpe"):
            get_tokenizer(name, **arguments)
