"""``prepare --part`` and ``--merge``: the same tokens as one call, each fault one clear line."""

import gzip
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastgpt2.prepare import main, prepare
from fastgpt2.text import GPT2Tokenizer, build_dataset, parts, save_tokenizer
from fastgpt2.text.corpora import load_corpus, split_pieces
from fastgpt2.text.documents import KnownSizes
from fastgpt2.text.parts import Part, merge_parts
from fastgpt2.text.prepared import open_prepared
from fastgpt2.text.tokenizing import write_pieces
from tests.text.tiny import tiny_files

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents of every kind; pieces of 100 bytes make many of each."""
    monkeypatch.setattr("fastgpt2.text.corpora.PIECE_BYTES", 100)
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = "".join(f"the {i} and é and the\n" for i in range(60))
    (folder / "a.txt").write_text(lines, encoding="utf-8")
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbf")
    (folder / "c.txt").write_text("x" * 900 + "é" * 300, encoding="utf-8")
    records = "".join(json.dumps({"text": f"record {i} " * (i % 7)}) + "\n" for i in range(40))
    (folder / "d.jsonl").write_text(records, encoding="utf-8")
    (folder / "e.txt.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "f.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    return folder


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.35, 0.5, 0.52, 0.7])
@pytest.mark.parametrize("parts", [1, 2, 7, 300])
def test_pieces_of_the_parts_are_those_of_the_whole(
    corpus: Path, parts: int, fraction: float
) -> None:
    texts = load_corpus(str(corpus))
    whole = list(split_pieces(texts, fraction))
    spans = [Part(number, parts).span(texts.size) for number in range(1, parts + 1)]
    assert [p for span in spans for p in split_pieces(texts, fraction, span)] == whole


def test_documents_before_a_span_are_not_read(corpus: Path) -> None:
    texts = load_corpus(str(corpus))
    size = texts.size
    (corpus / "a.txt").write_bytes(b"\xff" * (corpus / "a.txt").stat().st_size)
    assert list(split_pieces(texts, 0.1, (size // 2, size)))
    with pytest.raises(ValueError, match="is not UTF-8"):
        list(split_pieces(texts, 0.1, (0, size // 2)))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_border_in_the_last_character_of_a_document(name: str, tmp_path: Path) -> None:
    """The character goes to the training text, so nothing validates before the next document."""
    text = "x" * 9 + "é"
    content = text if name == "a.txt" else json.dumps({"text": text})
    (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "b.txt").write_text("y" * 9, encoding="utf-8")
    texts = load_corpus(str(tmp_path))
    whole = list(split_pieces(texts, 0.5))
    assert [p.text for p in whole if p.split == "val"] == ["y" * 9, ""]
    assert [p for span in ((0, 11), (11, 20)) for p in split_pieces(texts, 0.5, span)] == whole


def stream(folder: Path) -> dict[str, list[int]]:
    prepared = open_prepared(folder)
    return {split: tokens[:].tolist() for split, tokens in prepared.tokens.items()}


def make(corpus: Path, out: Path, *numbers: str, **options: object) -> int:
    """Parts by their numbers: I/N."""
    codes = []
    for number in numbers:
        args = ["--data", str(corpus), "--out", str(out), "--part", number, "--workers", "1"]
        flags = {"tokenizer": "bytes"} | options
        args += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        codes.append(main(args))
    return max(codes)


def test_merged_parts_equal_one_prepare(corpus: Path, tmp_path: Path) -> None:
    vocab = tmp_path / "vocab"
    save_tokenizer(GPT2Tokenizer(*tiny_files()), vocab)
    prepare([str(corpus)], tmp_path / "whole", vocab_dir=str(vocab), val_fraction=0.3)
    out = tmp_path / "out"
    # in any order, and shards shorter than a part
    options = {"tokenizer": "gpt2", "vocab_dir": vocab, "val_fraction": 0.3, "shard_tokens": 300}
    assert make(corpus, out, "3/3", "1/3", "2/3", **options) == 0
    assert main(["--merge", "--out", str(out)]) == 0
    assert stream(out) == stream(tmp_path / "whole")
    ours, theirs = build_dataset(str(out)), build_dataset(str(tmp_path / "whole"))
    assert (ours.train_bytes, ours.val_bytes) == (theirs.train_bytes, theirs.val_bytes)
    assert not (out / "prepare-parts").exists()
    # what is there reads back alone: no part is needed any more
    shutil.rmtree(corpus)
    assert main(["--merge", "--out", str(out)]) == 0
    assert make(tmp_path / "vocab", out, "1/3") == 2


def test_a_finished_part_is_skipped_and_a_half_one_is_made_again(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert make(corpus, out, "1/2") == 0
    assert " MB of text in " in (said := capsys.readouterr().out) and " MB/s a core" in said
    index = out / "prepare-parts" / "part-00001-of-00002" / "part.json"
    before = index.stat().st_mtime_ns
    # a machine lost its power in the middle of part 2
    half = out / "prepare-parts" / ".part-00002-of-00002.0a1b2c3d.tmp"
    half.mkdir()
    (half / "train-00000.tokens").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr("fastgpt2.text.parts.write_pieces", lambda *a, **k: pytest.fail("not again"))
        assert make(corpus, out, "1/2") == 0
    assert "part 1 of 2: finished already" in capsys.readouterr().out
    assert index.stat().st_mtime_ns == before
    assert make(corpus, out, "2/2") == 0
    assert not half.exists()
    merge_parts(out)
    prepare([str(corpus)], tmp_path / "whole", tokenizer="bytes")
    assert stream(out) == stream(tmp_path / "whole")


def test_files_are_counted_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second part, in a process of its own, takes the sizes from the first."""
    out = tmp_path / "out"
    counted: list[Path] = []

    class Counting(KnownSizes):
        def of(self, path: Path, kind: str, count: Callable[[], int]) -> int:
            def counting() -> int:
                counted.append(path)
                return count()

            return super().of(path, kind, counting)

    for number in ("1/2", "2/2", "1/2"):
        known = Counting()
        for module in ("documents", "corpora", "parts"):
            monkeypatch.setattr(f"fastgpt2.text.{module}.KNOWN_SIZES", known)
        assert make(corpus, out, number) == 0
        assert sorted({path.name for path in counted}) == ["d.jsonl", "e.txt.gz", "f.jsonl.gz"]
        assert len(counted) == 3
    # a changed file is counted again, and a damaged list is ignored
    sizes = KnownSizes()
    path = out / "prepare-parts" / "sizes.json"
    sizes.load(path)
    assert sizes.of(corpus / "d.jsonl", "text", lambda: -1) > 0
    os.utime(corpus / "d.jsonl", (1, 1))
    assert sizes.of(corpus / "d.jsonl", "text", lambda: -1) == -1
    path.write_text("[1]", encoding="utf-8")
    sizes.load(path)


def test_a_merge_that_was_killed_is_done_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    make(corpus, out, "1/2", "2/2")
    for name in ("write_manifest", "shutil.rmtree"):

        def die(*arguments: object, **options: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"fastgpt2.text.parts.{name}", die)
            merge_parts(out)
        assert (out / "prepare-parts" / "part-00002-of-00002").is_dir()
    merge_parts(out)
    prepare([str(corpus)], tmp_path / "whole", tokenizer="bytes")
    assert stream(out) == stream(tmp_path / "whole")


FLAWS = {
    "missing": "of 3 parts in .* these are missing: 2",
    "of another N": "has parts of 2 and of 3; delete those of one",
    "no parts": "no parts in .*; make them with --part I/N",
    "input": "the input has changed between this part and part-00001",
    "corpus": "part-00002-of-00003: was made of another corpus: .*other.txt",
    "tokenizer": "part-00002-of-00003: was made with another tokenizer: 'gpt2",
    "fraction": "part-00002-of-00003: was made with another --val-fraction: 0.5",
    "span": r"part-00002-of-00003: has the bytes \[0, .* overlap or leave a gap",
    "bits": r"part-00002.*train-00000.tokens: expected sha256.*; delete .*3 and make that part",
    "swapped": r"part-00002.*train-00000.tokens: its checksum is not the one in",
    "index": r"part-00002.*part.json: damaged",
    "no index": r"part-00002.*part.json: cannot be read: No such file",
    "shard": r"part-00002.*train-00000.tokens: cannot be read: No such file",
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_merge_names_what_is_wrong(
    flaw: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    make(corpus, out, "1/3", "3/3")
    if flaw == "corpus":
        shutil.copy(corpus / "a.txt", tmp_path / "other.txt")
        make(tmp_path / "other.txt", out, "2/3")
    elif flaw == "tokenizer":
        save_tokenizer(GPT2Tokenizer(*tiny_files()), tmp_path / "vocab")
        make(corpus, out, "2/3", tokenizer="gpt2", vocab_dir=tmp_path / "vocab")
    elif flaw == "input":
        # the same size, and other letters
        (corpus / "a.txt").write_bytes((corpus / "a.txt").read_bytes().swapcase())
        os.utime(corpus / "a.txt", (1, 1))
        make(corpus, out, "2/3")
    elif flaw not in ("missing", "no parts"):
        make(corpus, out, "2/3", **({"val_fraction": 0.5} if flaw == "fraction" else {}))
    part = out / "prepare-parts" / "part-00002-of-00003"
    if flaw == "of another N":
        make(corpus, out, "1/2")
    elif flaw == "no parts":
        shutil.rmtree(out)
    elif flaw == "span":
        index = json.loads((part / "part.json").read_text(encoding="utf-8"))
        index["span"] = [0, index["span"][1]]
        (part / "part.json").write_text(json.dumps(index), encoding="utf-8")
    elif flaw == "bits":
        data = bytearray((part / "train-00000.tokens").read_bytes())
        data[-2] ^= 1
        (part / "train-00000.tokens").write_bytes(data)
    elif flaw == "swapped":
        other = out / "prepare-parts" / "part-00001-of-00003"
        shutil.copy(other / "train-00000.tokens", part)
    elif flaw == "index":
        (part / "part.json").write_text('{"format": "fastgpt2-part"}', encoding="utf-8")
    elif flaw in ("no index", "shard"):
        (part / ("part.json" if flaw == "no index" else "train-00000.tokens")).unlink()
    capsys.readouterr()
    assert main(["--merge", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("fastgpt2 prepare: error: ")
    with pytest.raises(AssertionError, match=FLAWS[flaw]):
        raise AssertionError(error)
    # nothing is taken for token shards
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "0/3"], "expected I/N with 1 <= I <= N, got '0/3'"),
        (["--part", "4/3"], "expected I/N with 1 <= I <= N, got '4/3'"),
        (["--part", "1"], "expected I/N with 1 <= I <= N, got '1'"),
        (["--part", "1/2", "--to", "llmc"], "--part tokenizes text into fastgpt2's shards"),
        (["--merge"], "--merge takes the parts in --out: give no --data"),
        (
            ["--part", "1/2", "--vocab-size", "9"],
            "--vocab-size 9: is for token files, and the data",
        ),
    ],
)
def test_mistakes_are_one_line(
    corpus: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        code: object = main(["--data", str(corpus), "--out", str(tmp_path / "out"), *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    error_line = capsys.readouterr().err
    assert message in error_line and error_line.count("\n") == 1


def test_a_finished_part_of_other_data_is_not_taken(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    make(corpus, out, "1/2")
    os.utime(corpus / "a.txt", (1, 1))
    assert make(corpus, out, "1/2") == 2
    assert "the input has changed between this part and this call" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds parts that are not merged; run fastgpt2 prepare"):
        build_dataset(str(out))


@pytest.mark.skipif(os.name == "nt", reason="a pipe with a name")
def test_what_can_be_read_only_once_has_no_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"text")
    os.close(writer)
    assert make(Path(f"/dev/fd/{reader}"), tmp_path / "out", "1/2") == 2
    os.close(reader)
    assert "can be read only once; write it to a file" in capsys.readouterr().err


def test_memory_of_a_part_is_that_of_its_pieces(tmp_path: Path) -> None:
    """A part in the middle of one long file, and one of many records."""
    (tmp_path / "a.txt").write_bytes(b"the quick brown fox\n" * 1_000_000)
    line = json.dumps({"text": "the quick brown fox " * 50}) + "\n"
    (tmp_path / "b.jsonl").write_text(line * 5_000, encoding="utf-8")
    corpus = load_corpus(str(tmp_path))
    tracemalloc.start()
    count = sum(piece.size for piece in split_pieces(corpus, 0.1, Part(2, 3).span(corpus.size)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert abs(count - corpus.size / 3) < 2 << 20
    # of 25 MB of text, a few pieces of 1 MiB
    assert peak < 8 << 20


def test_two_processes_do_not_make_one_part(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second would take the first one's work for what a crash has left."""
    out, codes, whole = tmp_path / "out", list[int](), write_pieces

    def write(*arguments: Any, **options: Any) -> str:
        # in the middle of the first
        monkeypatch.undo()
        codes.append(make(corpus, out, "1/1"))
        return whole(*arguments, **options)

    monkeypatch.setattr(parts, "write_pieces", write)
    assert make(corpus, out, "1/1") == 0
    assert codes == [2]
    said = capsys.readouterr().err
    assert "part-00001-of-00001: another process is at work on it" in said
    assert main(["--merge", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir())[0] == "fastgpt2_tokenizer.json"


@pytest.mark.parametrize(
    "flag",
    ["--to=llmc", "--tokenizer=bytes", "--val-fraction=0.5", "--shard-tokens=7", "--part=1/2"],
)
def test_a_merge_takes_no_flag_that_it_would_ignore(
    corpus: Path, tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    make(corpus, out, "1/2", "2/2")
    capsys.readouterr()
    assert main(["--merge", "--out", str(out), flag]) == 2
    name = flag.partition("=")[0]
    assert f"--merge takes the parts in --out: give no {name}\n" in capsys.readouterr().err
    assert not (out / "manifest.json").exists()
    assert main(["--merge", "--out", str(out), "--workers=1"]) == 0


def test_parts_do_not_go_where_the_data_are(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").write_text("precious", encoding="utf-8")
    before = sorted(corpus.iterdir())
    for out, message in (
        (corpus, "exists already and is not empty"),
        (other, "exists already and is not empty"),
        (other / "mine", "exists already and is not empty"),
        (corpus / "new" / "out", f"lies in {corpus}, where the next part would read it"),
    ):
        assert make(corpus, out, "1/2") == 2
        assert message in capsys.readouterr().err
    assert sorted(corpus.iterdir()) == before and len(list(other.iterdir())) == 1
