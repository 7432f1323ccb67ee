"""A folder of tokens with its tokenizer: write it in any format, open one in our format."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray

from fastgpt2.cli import quoted
from fastgpt2.errors import UserError
from fastgpt2.files import parse_json, write_text
from fastgpt2.text.encoding import Tokenizer, token_bytes
from fastgpt2.text.shards import SUFFIX, IdWriter, TokenShards
from fastgpt2.text.stored import StoredTokens
from fastgpt2.text.token_files import read_header
from fastgpt2.text.token_formats import TOKEN_FORMATS
from fastgpt2.text.tokenizers import load_tokenizer, save_tokenizer

FILE_NAME = "manifest.json"
FORMAT = "fastgpt2-tokens"
# holds the parts of `prepare --part` until they are merged
PARTS = "prepare-parts"


class PreparedWriter:
    """Writes ids into files of at most ``shard_tokens`` ids, one split after another.

    In our format the manifest is written last, if the ``with`` block succeeds: a folder without it
    does not count as token shards.

    Args:
        folder: where the files go.
        tokenizer: whose ids they are; it is saved beside them.
        shard_tokens: ids per file; ignored by formats with one file per split.
        source: what the ids were made from.
        to: a name in ``TOKEN_FORMATS``.

    Raises:
        UserError: a file of the format cannot hold ``shard_tokens`` ids.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        *,
        shard_tokens: int,
        source: str,
        to: str = "fastgpt2",
    ) -> None:
        self.files: dict[str, list[str]] = {}
        self.tokens: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        self._format, self._to = TOKEN_FORMATS[to], to
        most = self._format.most_tokens
        if most is not None and shard_tokens > most:
            raise UserError(f"--shard-tokens: a file of {to} holds {most} ids, got {shard_tokens}")
        self._folder = folder
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._source = source
        self._shard: IdWriter | None = None
        self._written: list[tuple[Path, IdWriter]] = []
        # closes the file that is being written
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        save_tokenizer(self._tokenizer, self._folder)
        return self

    def write(self, split: str, ids: NDArray[Any], text_bytes: int) -> None:
        """Append ids to ``split``; they stand for ``text_bytes`` of UTF-8 text."""
        if split not in self.files:
            self.files[split], self.tokens[split], self.bytes[split] = [], 0, 0
            self._shard = None
        while ids.size:
            if self._shard is None or self._room(self._shard) == 0:
                self._shard = self._next_file(split)
            now = ids[: self._room(self._shard)]
            self._shard.write(now)
            ids = ids[now.size :]
            self.tokens[split] += now.size
        self.bytes[split] += text_bytes

    def _room(self, shard: IdWriter) -> int | None:
        return None if self._format.one_file else self._shard_tokens - shard.count

    def _next_file(self, split: str) -> IdWriter:
        self._stack.close()
        name = self._format.name(split, len(self.files[split]))
        self.files[split].append(name)
        path = self._folder / name
        writer = self._stack.enter_context(self._format.create(path, self._tokenizer))
        self._written.append((path, writer))
        return writer

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        if error[0] is None:
            splits = {
                split: {"files": files, "tokens": self.tokens[split], "bytes": self.bytes[split]}
                for split, files in self.files.items()
            }
            self._finish(splits)

    def _finish(self, splits: dict[str, dict[str, Any]]) -> None:
        if self._to == "fastgpt2":
            write_manifest(self._folder, self._source, splits)

    def verify(self) -> None:
        """Read the files back and compare, after the ``with`` block.

        Raises:
            UserError: a file does not hold what was written.
        """
        if self._to == "fastgpt2":
            for shards in open_prepared(self._folder).tokens.values():
                shards.verify()
                shards.close()
            return
        lengths = token_bytes(self._tokenizer)
        for path, writer in self._written:
            tokens = StoredTokens([read_header(path)], self._tokenizer.vocab_size)
            tokens.check(lengths)
            tokens.close()
            if tokens.sha256 != writer.sha256:
                raise UserError(f"token file {path}: it does not read back as it was written")


def write_manifest(folder: Path, source: str, splits: dict[str, dict[str, Any]]) -> None:
    """Write the manifest that makes ``folder`` a folder of token shards.

    Args:
        folder: holds the shards and their tokenizer.
        source: what the tokens were made from.
        splits: ``files``, ``tokens`` and ``bytes`` of each split.
    """
    manifest = {"format": FORMAT, "source": source, "splits": splits}
    write_text(folder / FILE_NAME, json.dumps(manifest, indent=1) + "\n")


@dataclass(frozen=True)
class Prepared:
    """An opened folder of token shards, by split (``train``, ``val``)."""

    tokenizer: Tokenizer
    tokens: dict[str, TokenShards]
    bytes: dict[str, int]


def find_prepared(data: str | Sequence[str]) -> Path | None:
    """The folder of token shards that ``data`` names, or None."""
    items = [data] if isinstance(data, str) else list(data)
    folders = [Path(item) for item in items if (Path(item) / FILE_NAME).is_file()]
    if folders and len(items) > 1:
        raise UserError(f"data: {folders[0]} holds token shards; give it alone")
    for item in items:
        if (Path(item) / PARTS).is_dir() and Path(item) not in folders:
            raise UserError(
                f"data: {item} holds parts that are not merged; "
                f"run fastgpt2 prepare --merge --out {quoted(item)}"
            )
        if item.endswith(SUFFIX):
            raise UserError(f"data: {item} is one token shard; give the folder it is in")
    return folders[0] if folders else None


def open_prepared(folder: str | Path) -> Prepared:
    """Open a folder that ``fastgpt2.prepare`` wrote; check headers, sizes, counts and tokenizer.

    Raises:
        UserError: the manifest or a shard is missing, damaged, or belongs to another tokenizer.
    """
    path = Path(folder) / FILE_NAME
    try:
        manifest = parse_json(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise UserError(f"{path}: expected format {FORMAT!r}, got {manifest['format']!r}")
        splits = {
            split: ([str(name) for name in entry["files"]], int(entry["tokens"]))
            for split, entry in manifest["splits"].items()
        }
        sizes = {split: int(entry["bytes"]) for split, entry in manifest["splits"].items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged manifest: {error!r}") from error
    tokenizer = load_tokenizer(folder)
    tokens = {}
    for split, (files, count) in splits.items():
        shards = TokenShards([Path(folder) / name for name in files])
        if len(shards) != count:
            raise UserError(f"{path}: {split} has {len(shards)} tokens, recorded are {count}")
        if shards.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{path}: the shards of {split} are of tokenizer {shards.tokenizer} "
                f"{shards.fingerprint}, the folder's is {tokenizer.name} {tokenizer.fingerprint}"
            )
        tokens[split] = shards
    if "train" not in tokens:
        raise UserError(f"{path}: no training tokens")
    return Prepared(tokenizer, tokens, sizes)
