"""Binary data is never taken for text, and a byte-order mark never for a token."""

import codecs
import gzip
from pathlib import Path

import numpy as np
import pytest

from fastgpt2.errors import UserError
from fastgpt2.evaluate.tasks import TASKS, read_examples
from fastgpt2.prepare import prepare
from fastgpt2.text import CharTokenizer, GPT2Tokenizer, build_dataset
from fastgpt2.text.corpora import PIECE_BYTES, load_corpus, split_pieces
from fastgpt2.train.config_file import read_config
from tests.text.tiny import tiny_files

IDS = np.arange(64, dtype=np.uint16)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.dat", IDS.tobytes(), "NUL byte at offset 0; it looks like binary data"),
        ("train.dat", (IDS + 200).tobytes(), "is not UTF-8|NUL byte"),
        ("tok.dat", np.array([20240520, 1, 9], "<i4").tobytes(), "a token file of llm.c"),
        ("a.txt", "some text".encode("utf-16-le"), "NUL byte at offset 1; .* UTF-16"),
        ("a.txt", "some text".encode("utf-16-be"), "NUL byte at offset 0; .* UTF-16"),
        (
            "a.txt",
            b"\x89PNG\r\n\x1a\n\x00\x01",
            r"offset 0 \(invalid start byte\); it looks like binary",
        ),
        ("a.txt", "some text".encode("utf-16"), "offset 0 .*; it looks like text in UTF-16"),
        ("a.txt", "some text".encode("utf-32"), "offset 0 .*; it looks like text in UTF-32"),
        ("a.txt", "some text".encode("utf-32-le"), "NUL byte at offset 1"),
        ("a.txt", b"text" * 100 + bytes(100), "NUL byte at offset 400"),
        ("a.txt", "né".encode() * PIECE_BYTES + bytes(1), f"NUL byte at offset {3 * PIECE_BYTES}"),
        ("a.txt", codecs.BOM_UTF8 + b"text\0", "NUL byte at offset 7"),
        ("a.txt", codecs.BOM_UTF8 + b"text\xff", "byte 0xff at offset 7"),
        ("a.txt", b"text\0\xff", "NUL byte at offset 4"),
        ("a.txt", gzip.compress(b"text", mtime=0), "it looks like compressed by gzip"),
    ],
)
def test_binary_is_named_with_file_and_offset(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        build_dataset(str(path), "bytes")
    assert str(path) in str(caught.value)
    with pytest.raises(UserError, match=message):
        build_dataset(str(path), "char")
    with pytest.raises(UserError, match=message):
        prepare([str(path)], tmp_path / "out", tokenizer="bytes")
    assert not (tmp_path / "out").exists()


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + "né\ufeff".encode())
    (tmp_path / "b.txt").write_bytes(codecs.BOM_UTF8)
    (tmp_path / "c.txt").write_bytes(codecs.BOM_UTF8 + b"end")
    # the mark is dropped at the beginning of a file, and of each file
    for val_fraction in (0.0, 0.3, 0.99):
        pieces = list(split_pieces(load_corpus(str(tmp_path)), val_fraction))
        assert "".join(piece.text for piece in pieces) == "né\ufeffend"
        # two documents with text, and each ends
        assert sum(piece.after_document for piece in pieces) == 2
    vocabulary = build_dataset(str(tmp_path / "c.txt"), "char", val_fraction=0.0).tokenizer
    assert isinstance(vocabulary, CharTokenizer) and vocabulary.chars == ("d", "e", "n")


def test_a_byte_order_mark_in_other_files(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_bytes(codecs.BOM_UTF8 + b'model = "gpt2-nano"\n')
    assert read_config(str(config)) == {"model": "gpt2-nano"}
    for name, text in zip(("encoder.json", "vocab.bpe"), tiny_files(), strict=True):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + text.encode())
    plain = GPT2Tokenizer(*tiny_files())
    assert GPT2Tokenizer.from_folder(tmp_path).fingerprint == plain.fingerprint
    task = tmp_path / "lambada.jsonl"
    task.write_bytes(codecs.BOM_UTF8 + b'{"text": "the last word"}\n')
    assert read_examples(TASKS["lambada"], task)[0].context == "the last"
