"""A folder of token shards with its tokenizer and manifest: writing it, opening it."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray

from fastgpt2.errors import UserError
from fastgpt2.files import write_text
from fastgpt2.text.encoding import Tokenizer
from fastgpt2.text.shards import SUFFIX, ShardWriter, TokenShards, create_shard
from fastgpt2.text.tokenizers import load_tokenizer, save_tokenizer

FILE_NAME = "manifest.json"
FORMAT = "fastgpt2-tokens"


class PreparedWriter:
    """Writes ids into shards of at most ``shard_tokens`` ids, one split after the other.

    The manifest is written last, when the ``with`` block ends well: a folder without one is not
    taken for token shards.
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, *, shard_tokens: int, source: str
    ) -> None:
        self.files: dict[str, list[str]] = {}
        self.tokens: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        self._folder = folder
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._source = source
        self._shard: ShardWriter | None = None
        # holds the shard that is being written
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        save_tokenizer(self._tokenizer, self._folder)
        return self

    def write(self, split: str, ids: NDArray[Any], text_bytes: int) -> None:
        """Append ids to ``split``; ``text_bytes`` of UTF-8 text are what they stand for."""
        if split not in self.files:
            self.files[split], self.tokens[split], self.bytes[split] = [], 0, 0
            self._shard = None
        while ids.size:
            if self._shard is None or self._shard.count == self._shard_tokens:
                self._shard = self._next_shard(split)
            now = ids[: self._shard_tokens - self._shard.count]
            self._shard.write(now)
            ids = ids[now.size :]
            self.tokens[split] += now.size
        self.bytes[split] += text_bytes

    def _next_shard(self, split: str) -> ShardWriter:
        self._stack.close()
        name = f"{split}-{len(self.files[split]):05d}{SUFFIX}"
        self.files[split].append(name)
        return self._stack.enter_context(create_shard(self._folder / name, self._tokenizer))

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        if error[0] is None:
            splits = {
                split: {"files": files, "tokens": self.tokens[split], "bytes": self.bytes[split]}
                for split, files in self.files.items()
            }
            manifest = {"format": FORMAT, "source": self._source, "splits": splits}
            write_text(self._folder / FILE_NAME, json.dumps(manifest, indent=1) + "\n")


@dataclass(frozen=True)
class Prepared:
    """An opened folder of token shards, by split (``train``, ``val``)."""

    tokenizer: Tokenizer
    tokens: dict[str, TokenShards]
    bytes: dict[str, int]


def find_prepared(data: str | Sequence[str]) -> Path | None:
    """The folder of token shards that ``data`` names, if that is what it names."""
    items = [data] if isinstance(data, str) else list(data)
    folders = [Path(item) for item in items if (Path(item) / FILE_NAME).is_file()]
    if folders and len(items) > 1:
        raise UserError(f"data: {folders[0]} holds token shards; give it alone")
    for item in items:
        if item.endswith(SUFFIX):
            raise UserError(f"data: {item} is one token shard; give the folder it is in")
    return folders[0] if folders else None


def open_prepared(folder: str | Path) -> Prepared:
    """Open what ``fastgpt2.prepare`` wrote, checking headers, sizes, counts and the tokenizer.

    Raises:
        UserError: the manifest or a shard is missing, damaged or of another tokenizer.
    """
    path = Path(folder) / FILE_NAME
    try:
        manifest = json.loads(path.read_bytes())
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
