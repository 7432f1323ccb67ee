"""JSON lines, Parquet tables and compressed text as corpora."""

import gzip
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from fastgpt2.errors import UserError
from fastgpt2.evaluate.data import Documents, open_data
from fastgpt2.prepare import main, prepare
from fastgpt2.text import BytesTokenizer, build_dataset
from fastgpt2.text.corpora import PIECE_BYTES, Corpus, Document, load_corpus, split_pieces
from fastgpt2.text.documents import Records, read_chunks
from fastgpt2.train.__main__ import main as train

TEXTS = ["first\nline", "né \u2028 \0", "third"]
EOT = BytesTokenizer().eot
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def json_lines(texts: list[Any], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, column: text}) + "\n" for text in texts).encode()


def table(path: Path, texts: list[Any], column: str = "text", **options: Any) -> None:
    columns = {"id": list(range(len(texts))), column: texts}
    parquet.write_table(pyarrow.table(columns), path, **options)


def write(folder: Path, kind: str, texts: list[Any], column: str = "text") -> str:
    path = folder / f"a{kind}"
    if kind == ".parquet":
        table(path, texts, column)
    else:
        packed = path.suffix if path.suffix in PACK else ""
        path.write_bytes(PACK[packed](json_lines(texts, column)))
    return str(path)


def ids(texts: list[str]) -> list[int]:
    """Ids of documents, each ending with end-of-text."""
    return [id_ for text in texts for id_ in (*text.encode(), EOT)]


RECORDS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".JSONL.GZ", ".ndjson", ".ndjson.gz", ".parquet"]


@pytest.mark.parametrize("kind", RECORDS)
def test_every_record_is_a_document_that_ends(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind.lower(), TEXTS)
    path = str(Path(path).rename(tmp_path / f"b{kind}"))
    data = build_dataset(path, "bytes", val_fraction=0.0)
    assert list(data.train[:]) == ids(TEXTS)
    assert data.train_bytes == sum(len(text.encode()) for text in TEXTS)
    assert data.val is None
    prepare([path], tmp_path / "out", tokenizer="bytes", val_fraction=0.0)
    assert list(build_dataset(str(tmp_path / "out")).train[:]) == ids(TEXTS)
    opened = open_data([path])
    assert isinstance(opened, Documents)
    assert list(opened.tokenize(BytesTokenizer()).tokens[:]) == ids(TEXTS)


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_the_column_is_chosen(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, TEXTS, "body")
    data = build_dataset(path, "bytes", val_fraction=0.0, text_column="body")
    assert list(data.train[:]) == ids(TEXTS)
    with pytest.raises(UserError, match=r"no column 'text' \(--text-column\); there is 'id', 'bo"):
        build_dataset(path, "bytes")


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_compressed_text_is_the_text(tmp_path: Path, kind: str) -> None:
    text = "né\n" * 1000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    # two streams and padding; the first stream has the first byte of a character
    first, second = text.encode()[:2], text.encode()[2:]
    (tmp_path / f"a.txt{kind}").write_bytes(PACK[kind](first) + PACK[kind](second) + bytes(9))
    plain = build_dataset(str(tmp_path / "a.txt"), "bytes")
    packed = build_dataset(str(tmp_path / f"a.txt{kind}"), "bytes")
    assert packed.digest == plain.digest
    assert (packed.train_bytes, packed.val_bytes) == (plain.train_bytes, plain.val_bytes)


def test_records_and_texts_in_one_corpus(tmp_path: Path) -> None:
    (tmp_path / "0.txt").write_text("zero", encoding="utf-8")
    write(tmp_path, ".jsonl", ["one", "", "two"])
    (tmp_path / "z.txt").write_text("three", encoding="utf-8")
    data = build_dataset(str(tmp_path), "bytes", val_fraction=0.0)
    assert list(data.train[:]) == ids(["zero", "one", "two", "three"])


@pytest.mark.parametrize("cut", range(1, 11))
def test_the_border_falls_anywhere(tmp_path: Path, cut: int) -> None:
    texts = ["ab", "cdefg", "hijk"]
    path = write(tmp_path, ".jsonl", texts)
    data = build_dataset(path, "bytes", val_fraction=1 - (cut + 0.5) / 11)
    whole = ids(texts)
    assert data.val is not None
    assert list(data.train[:]) + list(data.val[:]) == whole
    # a document that ends at the border ends in the training text
    assert (list(data.train[:])[-1] == EOT) == (cut in (2, 7))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'text': 1}", r"line 3: not JSON: Expecting property name .* at column 2"),
        (b'["text"]', "line 3: expected a JSON object, got list"),
        (b"null", "line 3: expected a JSON object, got null"),
        (b'{"a": "b", "c": 1}', r"line 3: no column 'text' .*; there is 'a', 'c'"),
        (b"{}", "line 3: no column 'text' .*; there is none"),
        (b'{"text": null}', "line 3: 'text' must be text, got null"),
        (b'{"text": ["a"]}', "line 3: 'text' must be text, got list"),
        (b'{"text": "\xff"}', "line 3: not UTF-8: byte 0xff"),
        (b'{"text": "\\ud800"}', "line 3: 'text' has a lone surrogate"),
        (b"[" * 200_000, "line 3: not JSON that can be read"),
        (b'{"text": "a', "line 3: not JSON: Unterminated string"),
    ],
)
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_a_wrong_line_is_named(tmp_path: Path, line: bytes, message: str, packed: str) -> None:
    path = tmp_path / f"a.jsonl{packed}"
    # a byte-order mark and a blank line are fine
    path.write_bytes(PACK[packed](b'\xef\xbb\xbf{"text": "a"}\r\n\n' + line + b"\n"))
    with pytest.raises(UserError, match=f"a.jsonl{packed}, {message}") as error:
        load_corpus(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_a_byte_order_mark_is_not_of_the_text(tmp_path: Path, kind: str) -> None:
    """Texts that were read from files with a mark still begin with it."""
    path = write(tmp_path, kind, ["\ufefffirst \ufeff", "last"])
    data = build_dataset(path, "bytes", val_fraction=0.0)
    assert list(data.train[:]) == ids(["first \ufeff", "last"])


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_a_damaged_stream_is_named(tmp_path: Path, kind: str) -> None:
    # three lines in whole streams, then the beginning of another
    whole = PACK[kind](json_lines(["a", "b", "c"]))
    path = tmp_path / f"a.jsonl{kind}"
    for end in (b"", whole[:1], whole[:-1]):
        path.write_bytes(whole + whole + end)
        if end:
            with pytest.raises(UserError, match=rf"{kind} is cut off: its .* after line [6-9]$"):
                load_corpus(str(path))
        else:
            assert load_corpus(str(path)).size == 6
    path.write_bytes(whole + b"no stream")
    with pytest.raises(UserError, match=rf"jsonl{kind} is not .*, or damaged, after line 3: "):
        load_corpus(str(path))


def test_a_wrong_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table(path, ["a"] * 700 + [None])
    with pytest.raises(UserError, match=r"a\.parquet, row 701: 'text' must be text, got null"):
        load_corpus(str(path))
    table(path, [1, 2])
    with pytest.raises(UserError, match=r"a\.parquet, row 1: 'text' must be text, got int"):
        load_corpus(str(path))


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table(path, ["some text"] * 1000, compression="zstd", use_dictionary=False)
    whole = path.read_bytes()
    # cut off; not a table; a page overwritten
    for content in (whole[:-20], b"text", whole[:60] + bytes(40) + whole[100:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.parquet: cannot read the Parquet") as error:
            _ = Records(path, "text").size + Records(path, "id").size
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".parquet"])
def test_no_text_is_empty(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, [""])
    with pytest.raises(UserError, match=r"a\..* is empty"):
        load_corpus(path)


@pytest.mark.parametrize(
    ("library", "kind", "extra"),
    [("pyarrow", ".parquet", "parquet"), ("zstandard", ".zst", "zstd")],
)
def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, kind: str, extra: str
) -> None:
    if library == "zstandard" and sys.version_info >= (3, 14):
        pytest.skip("Python reads zstd by itself")
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / f"a{kind}").write_bytes(b"a")
    with pytest.raises(UserError, match=rf"needs {library}: pip install 'fastgpt2\[{extra}\]'$"):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_memory_is_bounded(tmp_path: Path, kind: str) -> None:
    line = json.dumps({"text": "word " * 2000}).encode() + b"\n"
    (tmp_path / f"a.jsonl{kind}").write_bytes(PACK[kind](line * 4000))
    tracemalloc.start()
    corpus = load_corpus(str(tmp_path))
    count = sum(len(piece.text) for piece in split_pieces(corpus, 0.1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == corpus.size == 4000 * 10_000
    # of 40 MB of text, compressed so well that a little of it is megabytes
    assert peak < 20 * PIECE_BYTES


def test_chunks_have_the_size(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"abcdefg" * 1000))
    assert [len(chunk) for chunk in read_chunks(path, 3000)] == [3000, 3000, 1000]
    assert Corpus("a", (Document("a", path),)).size == 7000


def test_the_commands_take_the_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, ".jsonl", TEXTS, "body")
    out = str(tmp_path / "out")
    flags = ["--data", path, "--tokenizer", "bytes", "--out", out]
    assert main(flags) == 2
    assert "a.jsonl, line 1: no column 'text'" in capsys.readouterr().err
    assert train(flags) == 2
    assert "a.jsonl, line 1: no column 'text'" in capsys.readouterr().err
    assert main([*flags, "--text-column", "body", "--workers", "1"]) == 0
    assert "train: " in capsys.readouterr().out


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("texts", [[], [""]])
def test_a_file_without_text_beside_others_is_left_out(
    tmp_path: Path, kind: str, texts: list[str]
) -> None:
    """A cluster's jobs write such files where a part of the data had no rows."""
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder, kind, ["one", "two"])
    if kind == ".parquet":
        schema = pyarrow.schema([("id", pyarrow.int64()), ("text", pyarrow.string())])
        rows = {"id": list(range(len(texts))), "text": texts}
        parquet.write_table(pyarrow.table(rows, schema), folder / "b.parquet")
    else:
        packed = ".gz" if kind.endswith(".gz") else ""
        (folder / f"b{kind}").write_bytes(PACK[packed](json_lines(texts)))
    data = build_dataset(str(folder), "bytes", val_fraction=0.0)
    assert list(data.train[:]) == ids(["one", "two"])


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    arrays = [pyarrow.array(["x"]), pyarrow.array(["y"])]
    parquet.write_table(pyarrow.Table.from_arrays(arrays, names=["text", "text"]), path)
    with pytest.raises(UserError, match=r"a\.parquet: 2 columns are called 'text'"):
        load_corpus(str(path))


def test_frames_that_zstd_skips(tmp_path: Path) -> None:
    """pzstd writes the size of each frame into a frame that readers skip."""
    pack = PACK[".zst"]
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"
    frames = [skipped + pack(json_lines([text])) for text in ("one", "two")]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(frames) + skipped)
    data = build_dataset(str(path), "bytes", val_fraction=0.0)
    assert list(data.train[:]) == ids(["one", "two"])
