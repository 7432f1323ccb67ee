"""llm.c's and nanoGPT's token files: what is read, and what is refused before the first step."""

import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from fastgpt2.errors import UserError
from fastgpt2.text import BytesTokenizer, GPT2Tokenizer, IdTokenizer, build_dataset, save_tokenizer
from fastgpt2.text.stored import StoredTokens, TokenFile
from fastgpt2.text.token_files import find_token_files, read_header
from tests.text.other_programs import write_llmc, write_meta, write_nanogpt

IDS = [50256, 0, 17, 50255, 1000, 2, 2, 40000] * 20


def all_ids(tokens: object) -> list[int]:
    assert isinstance(tokens, StoredTokens)
    return [int(id_) for id_ in tokens[:]]


@pytest.fixture
def vocab(tmp_path: Path, tiny_gpt2: GPT2Tokenizer) -> str:
    """A folder with a vocabulary of 267 ids."""
    save_tokenizer(tiny_gpt2, tmp_path / "vocab")
    return str(tmp_path / "vocab")


def test_shards_of_llmc_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "fineweb"
    folder.mkdir()
    for name, ids in {"val_000000": [5, 6], "train_000002": [3, 4], "train_000001": IDS}.items():
        write_llmc(folder / f"fineweb_{name}.bin", ids)
    data = build_dataset(str(folder), vocab_size=50257)
    assert all_ids(data.train) == [*IDS, 3, 4]
    assert all_ids(data.val) == [5, 6]
    assert (data.train_bytes, data.val_bytes, data.tokenizer.name) == (0, 0, "ids")
    pattern = build_dataset(str(folder / "*_train_*.bin"), vocab_size=50257, val_fraction=0.25)
    assert all_ids(pattern.train) + all_ids(pattern.val) == [*IDS, 3, 4]
    assert pattern.val is not None and len(pattern.val) == 41


def test_a_folder_of_nanogpt_is_train_and_val(tmp_path: Path, vocab: str) -> None:
    folder = write_nanogpt(tmp_path / "words", [1, 2, 3, 266], [4, 5])
    (folder / "input.txt").write_text("the text they were made from", encoding="utf-8")
    data = build_dataset(str(folder), vocab_dir=vocab)
    assert (all_ids(data.train), all_ids(data.val)) == ([1, 2, 3, 266], [4, 5])
    assert data.tokenizer.name == "gpt2"
    # bytes of the text: the last id ends a document
    assert (data.train_bytes, data.val_bytes) == (3, 2)


def test_one_validation_file_alone_is_split_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    path = write_llmc(tmp_path / "fineweb_val_000000.bin", list(range(100)))
    data = build_dataset(str(path), BytesTokenizer(), notify=said.append)
    assert data.val is not None and (len(data.train), len(data.val)) == (90, 10)
    assert said == ["data: no token file is named as validation: the last 0.1 of the ids"]


def test_files_without_ids_are_named(tmp_path: Path) -> None:
    said: list[str] = []
    write_llmc(tmp_path / "a_train.bin", IDS)
    (tmp_path / "README.md").write_text("hello", encoding="utf-8")
    build_dataset(str(tmp_path), vocab_size=50257, notify=said.append)
    assert f"data: left out 1 files without ids ({tmp_path / 'README.md'}, ...)" in said


def test_the_pickle_is_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.mkdir, (tmp_path / "ran",)  # type: ignore[return-value]

    folder = write_nanogpt(tmp_path / "char", [0, 1, 64], [2, 3])
    (folder / "meta.pkl").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"meta\.pkl has the vocabulary .* never opened.*--vocab"):
        build_dataset(str(folder))
    data = build_dataset(str(folder), vocab_size=65)
    assert all_ids(data.train) == [0, 1, 64]
    assert data.tokenizer.decode([0, 1, 64]) == " 0 1 64"
    assert not (tmp_path / "ran").exists()


def test_ids_of_characters_are_not_gpt2s(tmp_path: Path, tiny_gpt2: GPT2Tokenizer) -> None:
    folder = write_nanogpt(tmp_path / "char", [0, 1], [2, 3])
    write_meta(folder, "abcd")
    with pytest.raises(UserError, match=r"of a vocabulary of their own, as .*meta.pkl"):
        build_dataset(str(folder), tiny_gpt2)
    assert build_dataset(str(folder), IdTokenizer(4)).tokenizer.vocab_size == 4


HEADER = struct.pack("<3i", 20240520, 1, 3).ljust(1024, b"\0")
BODY = struct.pack("<3H", 7, 8, 9)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"", "is empty"),
        ("a.bin", HEADER[:500], "cut off: the header has 500 of 1024 bytes"),
        ("a.bin", HEADER[:4] + b"\2" + HEADER[5:] + BODY, "expected version 1 at offset 4, got 2"),
        ("a.bin", HEADER[:8] + b"\xff" * 4 + HEADER[12:], "number of ids at offset 8, got -1"),
        ("a.bin", HEADER[:8] + bytes(1016), "number of ids at offset 8, got 0"),
        ("a.bin", HEADER + BODY[:-1], "says 3 ids, which is 6 bytes after offset 1024; .* has 5"),
        ("a.bin", HEADER + BODY + BODY[2:], "says 3 ids, which is 6 bytes .* has 10$"),
        ("a.bin", HEADER + bytes(12), "has 12: ids of 4 bytes, expected uint16"),
        ("a.bin", HEADER + bytes(24), "has 24: ids of 8 bytes, expected uint16"),
        ("a.bin", struct.pack(">3i", 20240520, 1, 3) + bytes(1012), "numbers are big-endian"),
        ("a.bin", struct.pack("<i", 20240801) + bytes(1020), "for Llama 3"),
        ("a.bin", struct.pack("<i", 20240326) + bytes(1020), "is weights of llm.c"),
        ("a.bin", struct.pack("<3H", 7, 8, 9), "expected llm.c's magic number 20240520 .* 524295;"),
        ("a.bin", b"PK\x03\x04" + bytes(99), "it is a zip archive"),
        ("train.bin", b"PK\x03\x04" + bytes(99), "is a zip archive"),
        ("train.bin", BODY[:-1], "5 bytes, an odd number"),
        ("val.bin", np.arange(99, dtype="<u4").tobytes(), "every second number is 0: ids of 4 or"),
        ("val.bin", np.arange(99, dtype="<i8").tobytes(), "every second number is 0: ids of 4 or"),
        ("train.bin", "To be or not to bé\n".encode() * 400, "is text, not token ids in uint16"),
        ("train.bin", HEADER + BODY[:-1], "says 3 ids"),
        ("train.bin", struct.pack("<3H", 7, 50257, 9), "id 50257 at position 1 is not in the voc"),
        ("a_train.bin", HEADER + b"\xff" * 6, "id 65535 at position 0 is not in the vocabulary"),
    ],
)
def test_one_line_names_file_and_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"token file {path}: .*{message}"):
        build_dataset(str(path), vocab_size=50257, val_fraction=0.0)


def test_an_id_of_a_later_shard_has_its_place_there(tmp_path: Path, vocab: str) -> None:
    write_llmc(tmp_path / "a_train_1.bin", [1] * 50)
    bad = write_llmc(tmp_path / "a_train_2.bin", [2] * 30 + [267])
    with pytest.raises(UserError, match=f"{bad}: id 267 at position 30 is not in .* of 267"):
        build_dataset(str(tmp_path / "*.bin"), vocab_dir=vocab)


def test_tokens_and_text_do_not_mix(tmp_path: Path) -> None:
    path = write_llmc(tmp_path / "a.bin", IDS)
    text = tmp_path / "a.txt"
    text.write_text("hello", encoding="utf-8")
    with pytest.raises(UserError, match=f"{path} holds token ids and {text} does not"):
        build_dataset([str(path), str(text)])
    with pytest.raises(UserError, match="--vocab-size 9: is for token files, and the data are"):
        build_dataset(str(text), vocab_size=9)


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "message"),
    [
        ("ids", None, "--tokenizer ids: give the number of ids"),
        ("char", None, "--tokenizer char: .* has no characters; give --vocab-size"),
        ("gpt2", 300, "--vocab-size 300 and --tokenizer gpt2 exclude each other"),
        (BytesTokenizer(), 300, "--vocab-size 300: the tokenizer bytes has 257 ids"),
        ("auto", 0, "--vocab-size must be 1 or more, got 0"),
    ],
)
def test_what_the_ids_are_must_be_said(
    tmp_path: Path, tokenizer: str, vocab_size: int | None, message: str
) -> None:
    path = write_llmc(tmp_path / "a.bin", [1, 2, 3])
    with pytest.raises(UserError, match=message):
        build_dataset(str(path), tokenizer, vocab_size=vocab_size)


def test_the_tokenizer_beside_the_files_counts(tmp_path: Path, tiny_gpt2: GPT2Tokenizer) -> None:
    for name in ("one", "two"):
        write_nanogpt(tmp_path / name, [1, 2, 3], [4, 5])
    save_tokenizer(BytesTokenizer(), tmp_path / "one")
    assert build_dataset(str(tmp_path / "one")).tokenizer.name == "bytes"
    with pytest.raises(UserError, match=r"--tokenizer gpt2: .* says that their ids are of bytes"):
        build_dataset(str(tmp_path / "one"), "gpt2")
    with pytest.raises(UserError, match=r"are of bytes .*the model's tokenizer is gpt2"):
        build_dataset(str(tmp_path / "one"), tiny_gpt2)
    save_tokenizer(IdTokenizer(9), tmp_path / "two")
    with pytest.raises(UserError, match=r"one and .*two are of different tokenizers"):
        build_dataset([str(tmp_path / "one"), str(tmp_path / "two")])


def test_the_digest_is_of_the_ids_wherever_they_lie(tmp_path: Path) -> None:
    write_llmc(tmp_path / "a_train.bin", IDS)
    write_llmc(tmp_path / "a_val.bin", [1, 2])
    write_nanogpt(tmp_path / "n", IDS, [1, 2])
    digests = [
        build_dataset(str(place), vocab_size=50257).digest
        for place in (tmp_path / "a_*.bin", tmp_path / "n")
    ]
    assert digests[0] == digests[1]
    write_nanogpt(tmp_path / "n", IDS, [1, 3])
    assert build_dataset(str(tmp_path / "n"), vocab_size=50257).digest != digests[0]


def test_a_part_is_a_sequence_of_its_own(tmp_path: Path) -> None:
    files = [read_header(write_llmc(tmp_path / f"{n}.bin", IDS[n:])) for n in (0, 50)]
    tokens = StoredTokens(files, 50257)
    expected = IDS + IDS[50:]
    part = pickle.loads(pickle.dumps(tokens.part(10, -20).part(5)))
    assert all_ids(part) == expected[15:-20]
    assert all_ids(part.part(150)) == expected[165:-20]
    assert TokenFile(tmp_path / "0.bin", 1024, np.dtype("<u2"), len(IDS)) == files[0]


def test_files_of_runs_are_not_tokens(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.toml").write_text("", encoding="utf-8")
    write_llmc(run / "a.bin", IDS)
    assert find_token_files(str(tmp_path)) is None
    shutil.move(run / "a.bin", tmp_path / "a.bin")
    found = find_token_files(str(tmp_path))
    assert found is not None and found.all == (tmp_path / "a.bin",)
