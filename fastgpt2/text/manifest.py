"""A folder of token shards: what is in it, and opening it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgpt2.errors import UserError
from fastgpt2.text.encoding import Tokenizer
from fastgpt2.text.shards import SUFFIX, TokenShards
from fastgpt2.text.tokenizers import load_tokenizer

FILE_NAME = "manifest.json"
FORMAT = "fastgpt2-tokens"


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
