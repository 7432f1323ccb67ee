"""``prepare`` on many machines without a coordinator: each part alone, then one merge.

The corpus is a sequence of bytes, [0, S). Part I of N tokenizes the pieces that begin in
[S (I - 1) / N, S I / N), which are identical to those of the whole: the tokens of all parts in
order are those of one ``prepare``. Until the merge, ``--out`` holds

    OUT/prepare-parts/part-00001-of-00016/   part.json, the part's shards, its tokenizer

and ``merge_parts`` makes OUT the folder that training reads.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastgpt2.cli import quoted
from fastgpt2.errors import UserError
from fastgpt2.files import (
    atomic_folder,
    locked,
    new_folders,
    parse_json,
    sync,
    write_text,
)
from fastgpt2.text.corpora import PYTHON_DOCS, Corpus, Document, absolute, load_corpus, split_pieces
from fastgpt2.text.documents import KNOWN_SIZES
from fastgpt2.text.encoding import Tokenizer
from fastgpt2.text.prepared import FILE_NAME as MANIFEST
from fastgpt2.text.prepared import PARTS, PreparedWriter, open_prepared, write_manifest
from fastgpt2.text.shards import TokenShards
from fastgpt2.text.token_formats import TOKEN_FORMATS
from fastgpt2.text.tokenizers import get_tokenizer, load_tokenizer, save_tokenizer
from fastgpt2.text.tokenizing import write_pieces

INDEX = "part.json"
# bytes of text in each file, shared by the parts so that each file is counted once
SIZES = "sizes.json"
FORMAT = "fastgpt2-part"
_NAME = re.compile(r"part-(\d{5,})-of-(\d{5,})")
SPLITS = ("train", "val")


class Part(NamedTuple):
    """Part ``number``, from 1, of ``parts``."""

    number: int
    parts: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"part-{self.number:05d}-of-{self.parts:05d}"

    def span(self, size: int) -> tuple[int, int]:
        """The bytes [start, stop) of a corpus of ``size`` bytes where the part's pieces begin."""
        return size * (self.number - 1) // self.parts, size * self.number // self.parts


def parse_part(text: str) -> Part:
    """Parse ``I/N``, the value of ``--part``.

    Args:
        text: the value.

    Raises:
        ArgumentTypeError: not two numbers with 1 <= I <= N.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with 1 <= I <= N, got {text!r}")
    return Part(int(match[1]), int(match[2]))


def prepare_part(
    data: Sequence[str],
    out: Path,
    part: Part,
    *,
    tokenizer: str,
    vocab_dir: str | None,
    val_fraction: float,
    text_column: str,
    shard_tokens: int,
    workers: int,
) -> None:
    """Tokenize one part of ``data``, unless it is done already.

    The part's folder appears when it is complete; leftovers of an interrupted call are deleted
    first. Files of records and compressed files are read once to count their bytes: by the first
    part, and by parts that start before that count is finished.

    Args:
        data: what ``load_corpus`` takes, except what can be read only once (pipes).
        out: the folder for all parts.
        part: which part.
        tokenizer: a name for ``get_tokenizer``.
        vocab_dir: folder with GPT-2's vocabulary files.
        val_fraction: share of the whole text, at its end, kept for validation.
        text_column: key of a JSON line, or column of a table, that holds the text.
        shard_tokens: ids per file.
        workers: processes that tokenize.

    Raises:
        UserError: anything wrong with the data, or ``out`` has parts of another corpus.
    """
    if (out / MANIFEST).exists():
        raise UserError(f"--part: {out} is merged already; give another --out")
    if out.exists() and not (out / PARTS).is_dir() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists already and is not empty")
    for folder in filter(Path.is_dir, map(Path, data)):
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--out {out}: lies in {folder}, where the next part would read it")
    sizes = out / PARTS / SIZES
    with _shared_sizes(sizes):
        corpus = load_corpus(data, text_column=text_column, notify=print)
        KNOWN_SIZES.save(sizes)
        before = _fingerprint(corpus)
        chosen = get_tokenizer(tokenizer, vocab_dir=vocab_dir, text=corpus.pieces())
        identity = {
            "source": ", ".join(absolute(item) for item in data),
            "text_column": text_column,
            "tokenizer": f"{chosen.name} {chosen.fingerprint}",
            "val_fraction": val_fraction,
            "corpus": before,
        }
        final = out / PARTS / part.name
        if (final / INDEX).is_file():
            _check_identity(final, read_index(final), "this call", identity)
            print(f"part {part.number} of {part.parts}: finished already: {final}")
            return
        taken = f"{final}: another process is at work on it"
        with locked(out / PARTS / f".{part.name}.lock", taken):
            tokens, speed = _write_part(
                final, part, corpus, chosen, identity, shard_tokens=shard_tokens, workers=workers
            )
        print(f"part {part.number} of {part.parts}: {tokens:,} tokens; {speed}")
        print(f"when all parts are there: fastgpt2 prepare --merge --out {quoted(out)}")


def _write_part(
    final: Path,
    part: Part,
    corpus: Corpus,
    tokenizer: Tokenizer,
    identity: dict[str, Any],
    *,
    shard_tokens: int,
    workers: int,
) -> tuple[int, str]:
    """Tokenize a part into its folder ``final``; returns its tokens and the speed in words."""
    for leftover in final.parent.glob(f".{part.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    first, last = part.span(corpus.size)
    with atomic_folder(final, last=(INDEX,)) as folder:
        index = identity | {"part": part.number, "parts": part.parts, "span": [first, last]}
        writer = _PartWriter(folder, tokenizer, shard_tokens, index | {"size": corpus.size})
        with writer:
            speed = write_pieces(
                writer,
                split_pieces(corpus, identity["val_fraction"], (first, last)),
                folder,
                tokenizer,
                workers=workers,
                total=last - first,
            )
            if _fingerprint(corpus) != identity["corpus"]:
                raise UserError(f"data: {identity['source']} has changed while it was read")
        _verify(folder, read_index(folder))
    return sum(writer.tokens.values()), speed


@contextmanager
def _shared_sizes(path: Path) -> Iterator[None]:
    """Add the counts that other parts have made; a failed call leaves no new file of counts."""
    there = path.exists()
    KNOWN_SIZES.load(path)
    with new_folders(path.parent):
        try:
            yield
        except Exception:
            if not there:
                path.unlink(missing_ok=True)
            raise


class _PartWriter(PreparedWriter):
    """Writes the part's index instead of a manifest."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, shard_tokens: int, index: dict[str, Any]
    ) -> None:
        super().__init__(folder, tokenizer, shard_tokens=shard_tokens, source=index["source"])
        self._index = index

    def _finish(self, splits: dict[str, dict[str, Any]]) -> None:
        digests = {path.name: writer.sha256.hex() for path, writer in self._written}
        index = {"format": FORMAT, **self._index, "splits": splits, "sha256": digests}
        write_text(self._folder / INDEX, json.dumps(index, indent=1) + "\n")


def _fingerprint(corpus: Corpus) -> str:
    """Digest of the files' names, sizes and times; of texts in memory, of their bytes."""
    digest = hashlib.sha256()
    for document in corpus.documents:
        content = document.content if isinstance(document, Document) else document.path
        if isinstance(content, bytes):
            if not document.name.startswith(PYTHON_DOCS):
                raise UserError(
                    f"--part: {document.name} can be read only once; write it to a file"
                )
            facts = hashlib.sha256(content).hexdigest()
        else:
            stat = content.stat()
            facts = f"{content.absolute()} {stat.st_size} {stat.st_mtime_ns}"
        digest.update(f"{facts}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def read_index(folder: Path) -> dict[str, Any]:
    """The index that describes a part.

    Args:
        folder: the part's folder.

    Raises:
        UserError: the index cannot be read, or an entry is missing.
    """
    path = folder / INDEX
    try:
        index: dict[str, Any] = parse_json(path.read_bytes())
        expected = {"source", "text_column", "tokenizer", "val_fraction", "corpus"}
        expected |= {"part", "parts", "span", "size", "splits", "sha256"}
        if index["format"] != FORMAT or not expected <= index.keys():
            raise UserError(f"{path}: damaged: not the index of a part, or not all of it")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged: {error!r}") from None
    return index


def _check_identity(
    folder: Path, index: dict[str, Any], other: str, expected: dict[str, Any]
) -> None:
    """Raise a UserError that names what differs between a part and ``other``."""
    names = {
        "source": "of another corpus",
        "text_column": "with another --text-column",
        "tokenizer": "with another tokenizer",
        "val_fraction": "with another --val-fraction",
    }
    for key, what in names.items():
        if index[key] != expected[key]:
            raise UserError(
                f"{folder}: was made {what}: {index[key]!r}, but {other} has {expected[key]!r}; "
                "delete the one that is wrong and make it again"
            )
    if index["corpus"] != expected["corpus"]:
        raise UserError(
            f"{folder}: the input has changed between this part and {other} (names, sizes or "
            "times of the files); delete the older parts and make them again"
        )


def _verify(folder: Path, index: dict[str, Any]) -> None:
    """Read all shards of a part and compare them with its index."""
    for split, entry in index["splits"].items():
        if not entry["files"]:
            continue
        shards = TokenShards([folder / name for name in entry["files"]])
        shards.verify()
        shards.close()
        for path, header in zip(shards.paths, shards.headers, strict=True):
            if header.sha256.hex() != index["sha256"].get(path.name):
                raise UserError(f"{path}: its checksum is not the one in {folder / INDEX}")
        if len(shards) != entry["tokens"]:
            raise UserError(
                f"{folder}: {split} has {len(shards)} tokens, recorded are {entry['tokens']}"
            )
        if f"{shards.tokenizer} {shards.fingerprint}" != index["tokenizer"]:
            raise UserError(f"{folder}: its shards are not of the tokenizer {index['tokenizer']}")


def merge_parts(out: Path) -> None:
    """Check all parts in ``out`` and make it a folder of token shards; the parts are deleted.

    The shards keep their bytes and get new names. An interrupted merge can be repeated.

    Args:
        out: the folder that ``prepare --part`` was given.

    Raises:
        UserError: a part is missing, damaged, or does not belong to the others.
    """
    folder = out / PARTS
    if (out / MANIFEST).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        open_prepared(out)
        print(f"merged already: {out}")
        return
    parts = _all_parts(folder)
    indexes = [read_index(path) for path in parts]
    for number, (path, index) in enumerate(zip(parts, indexes, strict=True), start=1):
        _check_identity(path, index, parts[0].name, indexes[0])
        expected = list(Part(number, len(parts)).span(indexes[0]["size"]))
        found = [index["part"], index["parts"], index["size"], index["span"]]
        if found != [number, len(parts), indexes[0]["size"], expected]:
            raise UserError(
                f"{path}: has the bytes {index['span']} of {index['size']}, expected {expected}: "
                "parts overlap or leave a gap"
            )
        try:
            _verify(path, index)
        except UserError as error:
            # a part that is there is skipped, damaged or not
            raise UserError(f"{error}; delete {path} and make that part again") from None
    splits = _take_shards(out, parts, indexes)
    save_tokenizer(load_tokenizer(parts[0]), out)
    sync(out)
    write_manifest(out, indexes[0]["source"], splits)
    for shards in open_prepared(out).tokens.values():
        shards.close()
    shutil.rmtree(folder)
    for split, entry in splits.items():
        print(
            f"{split}: {entry['tokens']:,} tokens of {entry['bytes']:,} bytes in "
            f"{len(entry['files'])} shard(s), from {len(parts)} parts"
        )
    print(f"train on them: python -m fastgpt2.train --data {quoted(out)}")


def _all_parts(folder: Path) -> list[Path]:
    """The folders of all parts, in order."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    found = {path: match for path in entries if (match := _NAME.fullmatch(path.name))}
    counts = sorted({int(match[2]) for match in found.values()})
    if not counts:
        raise UserError(f"--merge: no parts in {folder}; make them with --part I/N")
    if len(counts) > 1:
        raise UserError(
            f"--merge: {folder} has parts of {counts[0]} and of {counts[1]}; delete those of one"
        )
    there = {int(match[1]) for match in found.values()}
    missing = [str(number) for number in range(1, counts[0] + 1) if number not in there]
    if missing:
        raise UserError(
            f"--merge: of {counts[0]} parts in {folder} these are missing: {', '.join(missing)}"
        )
    return list(found)


def _take_shards(
    out: Path, parts: list[Path], indexes: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Link each shard into ``out`` under its final name; returns the manifest's splits."""
    splits: dict[str, dict[str, Any]] = {}
    for part, index in zip(parts, indexes, strict=True):
        for split in SPLITS:
            entry = index["splits"].get(split)
            if entry is None or not entry["files"]:
                continue
            whole = splits.setdefault(split, {"files": [], "tokens": 0, "bytes": 0})
            whole["tokens"] += entry["tokens"]
            whole["bytes"] += entry["bytes"]
            for file in entry["files"]:
                name = TOKEN_FORMATS["fastgpt2"].name(split, len(whole["files"]))
                _link(part / file, out / name)
                whole["files"].append(name)
    if "train" not in splits:
        raise UserError(f"--merge: the parts in {out} have no training tokens")
    return splits


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy if the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)
