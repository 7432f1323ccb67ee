import gzip
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt2.errors import UserError
from fastgpt2.text import BytesTokenizer, GPT2Tokenizer
from fastgpt2.text.corpora import (
    PIECE_BYTES,
    REMOTE,
    Corpus,
    Document,
    RemoteText,
    cut_point,
    load_corpus,
    python_docs,
    split_pieces,
)
from tests.loopback import Site, content, status
from tests.text.tiny import BESIDE_THE_REPOSITORY


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def texts(corpus: Corpus) -> list[str]:
    files = [document for document in corpus.documents if isinstance(document, Document)]
    return [b"".join(file.chunks(100)).decode("utf-8") for file in files]


def test_a_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "line\r\nné\n")
    corpus = load_corpus(str(path))
    assert texts(corpus) == ["line\r\nné\n"]
    assert corpus.size == 10
    assert corpus.source == str(path)


def test_folders_patterns_and_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden", ".git/config", "empty.txt"):
        write(tmp_path / "in" / name, "" if name == "empty.txt" else name)
    write(tmp_path / "x.md", "x.md")
    assert texts(load_corpus(str(tmp_path / "in"))) == ["a.txt", "b.txt", "sub/c.txt"]
    assert texts(load_corpus(str(tmp_path / "in" / "*.txt"))) == ["a.txt", "b.txt"]
    assert texts(load_corpus(str(tmp_path / "**" / "c.txt"))) == ["sub/c.txt"]
    both = [str(tmp_path / "x.md"), str(tmp_path / "in" / "b.txt")]
    assert texts(load_corpus(both)) == ["x.md", "b.txt"]
    assert load_corpus(both).source == ", ".join(both)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"no file, folder, pattern or corpus 'no/where\.txt'"):
        load_corpus("no/where.txt")
    with pytest.raises(UserError, match="did you mean 'tinyshakespeare'"):
        load_corpus("tiny-shakespeare")
    with pytest.raises(UserError, match="nothing given"):
        load_corpus([])


def test_empty_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "empty.txt", "")
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        load_corpus(["python-docs", str(path)])
    with pytest.raises(UserError, match="is empty"):
        load_corpus(str(tmp_path))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder has no files"):
        load_corpus(str(tmp_path / "folder"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"abc\xffdef", r"byte 0xff at offset 3 \(invalid start byte\)"),
        ("ünïcödé".encode("latin-1"), "byte 0xfc at offset 0"),
        ("abc".encode("utf-16"), "byte 0xff at offset 0"),
        ("né".encode()[:-1], r"byte 0xc3 at offset 1 \(unexpected end of data\)"),
        (b"a" * (1 << 20) + b"\xe2\x82" + b"b", "byte 0xe2 at offset 1048576"),
        (b"a" * ((1 << 20) - 1) + b"\xe2\x82" + b"b", "byte 0xe2 at offset 1048575"),
    ],
)
def test_not_utf8_names_the_file_and_the_byte(tmp_path: Path, data: bytes, message: str) -> None:
    path = write(tmp_path / "bad.txt", data)
    with pytest.raises(UserError, match=rf"bad\.txt is not UTF-8: {message}"):
        list(split_pieces(load_corpus(str(path)), 0.1))


def test_python_docs_need_no_network(offline: None) -> None:
    corpus = load_corpus("python-docs")
    assert corpus.size > 200_000
    assert 'The "with" statement' in "".join(corpus.pieces())


def test_python_docs_hold_no_paragraph_twice() -> None:
    paragraphs = [
        paragraph
        for text in texts(Corpus("python-docs", tuple(python_docs())))
        for paragraph in text.strip().split("\n\n")
    ]
    assert len(paragraphs) == len(set(paragraphs))


@pytest.fixture
def remote(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bytes:
    """A text known by name that this machine serves."""
    monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path / "cache"))
    data = b"It was the best of times\n" * 99
    urls = (site.add("/gone", status(404)), site.add("/text", content(data)))
    known = RemoteText("text.txt", urls, hashlib.sha256(data).hexdigest(), len(data))
    monkeypatch.setitem(REMOTE, "tale", known)
    return data


def test_named_corpus_is_downloaded_once(remote: bytes, site: Site, tmp_path: Path) -> None:
    for _ in range(2):
        corpus = load_corpus("tale")
        assert texts(corpus) == [remote.decode()]
        assert corpus.source == "tale"
    assert [path for path, _ in site.asked] == ["/gone", "/text"]
    assert (tmp_path / "cache" / "corpora" / "text.txt").read_bytes() == remote


def test_changed_text_on_the_network_is_refused(remote: bytes, site: Site) -> None:
    site.add("/text", content(remote.replace(b"best", b"BEST")))
    with pytest.raises(UserError, match=r"expected sha256 .*, got .*; give a text file instead"):
        load_corpus("tale")


def test_offline_says_how_to_give_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path))
    for name, known in REMOTE.items():
        dead = RemoteText(known.file, ("http://127.0.0.1:9/",), known.sha256, known.size)
        monkeypatch.setitem(REMOTE, name, dead)
    for name in ("the-verdict", "tinyshakespeare"):
        with pytest.raises(
            UserError, match=f"{name} could not be downloaded .* --data FILE"
        ) as caught:
            load_corpus(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(REMOTE))
def test_recorded_checksums_are_those_of_the_texts(name: str) -> None:
    path = BESIDE_THE_REPOSITORY / "data" / REMOTE[name].file
    if not path.is_file():
        pytest.skip(f"no copy of {name} beside the repository")
    data = path.read_bytes()
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (REMOTE[name].sha256, REMOTE[name].size)


CHARS = st.text(st.sampled_from("ab é日\n\t 👩"), max_size=40)


@given(
    documents=st.lists(CHARS.filter(bool), min_size=1, max_size=5),
    fraction=st.floats(0, 1, exclude_max=True),
    piece_bytes=st.integers(1, 30),
)
def test_split_covers_all_text_in_order(
    documents: list[str], fraction: float, piece_bytes: int
) -> None:
    corpus = Corpus("test", tuple(Document("d", text.encode("utf-8")) for text in documents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastgpt2.text.corpora.PIECE_BYTES", piece_bytes)
        pieces = list(split_pieces(corpus, fraction))
    assert "".join(piece.text for piece in pieces) == "".join(documents)
    # training text first, as many bytes as asked for, to within one character
    splits = [piece.split for piece in pieces]
    assert splits == sorted(splits)
    train = sum(len(piece.text.encode("utf-8")) for piece in pieces if piece.split == "train")
    assert 0 <= train - int(corpus.size * (1 - fraction)) < 4
    # every document ends, in whichever split
    marked = "".join("|" * piece.after_document + piece.text for piece in pieces)
    assert marked == "".join(f"{text}|" for text in documents)
    assert fraction > 0 or splits[-1] == "train"


def test_one_file_is_split_as_nanogpt_splits_it() -> None:
    text = "0123456789" * 1234 + "abc"
    pieces = list(split_pieces(Corpus("test", (Document("d", text.encode()),)), 0.1))
    assert [piece.text for piece in pieces] == [
        text[: int(len(text) * 0.9)],
        text[int(len(text) * 0.9) :],
        # the document ends
        "",
    ]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0, float("nan")])
def test_impossible_fraction(fraction: float) -> None:
    with pytest.raises(UserError, match="val_fraction must be in"):
        list(split_pieces(load_corpus("python-docs"), fraction))


@given(text=st.text(st.sampled_from("the and' s1\n\t\u00a0\u2003\x1cé."), max_size=30))
def test_a_cut_changes_no_token(text: str, tiny_gpt2: GPT2Tokenizer) -> None:
    cut = cut_point(text)
    if cut == len(text):
        return
    parts = tiny_gpt2.encode(text[:cut]) + tiny_gpt2.encode(text[cut:])
    assert parts == tiny_gpt2.encode(text)


def test_cut_point_takes_the_last_line_end() -> None:
    assert cut_point("one\ntwo\n\nthree four") == 7
    assert cut_point("one two three") == 7
    assert cut_point("one") == 3
    assert cut_point("\n\n  ") == 4
    assert cut_point("") == 0


def test_pieces_of_a_large_file_encode_as_the_whole(
    tmp_path: Path, tiny_gpt2: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgpt2.text.corpora.PIECE_BYTES", 1000)
    text = "".join(f"the {i}  and\n\n in é {i * i}\n" for i in range(2000))
    corpus = load_corpus(str(write(tmp_path / "f", text)))
    pieces = [piece.text for piece in split_pieces(corpus, 0.0)]
    assert len(pieces) > 30
    assert max(len(piece) for piece in pieces) <= 2000
    for tokenizer in (tiny_gpt2, BytesTokenizer()):
        ids = [id_ for piece in pieces for id_ in tokenizer.encode(piece)]
        assert ids == tokenizer.encode(text)


def test_a_text_without_spaces_is_still_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt2.text.corpora.PIECE_BYTES", 1000)
    corpus = Corpus("test", (Document("d", b"x" * 100_000),))
    assert max(len(piece.text) for piece in split_pieces(corpus, 0.0)) <= 2000


LINE = b'{"text": "a line"}\n'


@pytest.mark.parametrize(
    ("name", "lines", "left", "message"),
    [
        # what is left of the file after its first piece was read
        ("a.txt", 2 * PIECE_BYTES // len(LINE), 0, "has changed while it was read"),
        ("a.txt", 2 * PIECE_BYTES // len(LINE), 1 << 22, "has changed while it was read"),
        ("a.jsonl", 8000, 4000 * len(LINE), "has changed while it was read"),
        ("a.txt.gz", 2 * PIECE_BYTES // len(LINE), 0, "is cut off"),
    ],
)
def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, name: str, lines: int, left: int, message: str
) -> None:
    text = LINE * lines
    path = write(tmp_path / name, gzip.compress(text, 1) if name.endswith("gz") else text)
    pieces = split_pieces(load_corpus(str(path)), 0.1)
    next(pieces)
    if left > len(text):
        with path.open("ab") as file:
            file.write(LINE * 1000)
    else:
        os.truncate(path, left)
    with pytest.raises(UserError, match=f"{name} {message}"):
        list(pieces)


def test_a_file_is_read_once_however_often_it_is_named(tmp_path: Path) -> None:
    """Its second copy would be in the validation text, and its first in the training text."""
    for name in ("a.txt", "b.txt", "c.jsonl"):
        write(tmp_path / "in" / name, '{"text": "x"}\n' if name == "c.jsonl" else name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "in" / "a.txt")
    said: list[str] = []
    folder, first = str(tmp_path / "in"), str(tmp_path / "in" / "b.txt")
    names = [first, folder, str(tmp_path / "link.txt"), f"{folder}/*.jsonl"]
    corpus = load_corpus(names, notify=said.append)
    assert [document.name for document in corpus.documents] == [
        str(tmp_path / "in" / name) for name in ("b.txt", "a.txt", "c.jsonl")
    ]
    assert said == [f"data: named more than once, read once: {first} and 2 more"]
    said.clear()
    load_corpus([first, str(tmp_path / "in" / "a.txt")], notify=said.append)
    assert said == []
