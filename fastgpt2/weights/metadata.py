"""The small files beside the weights: JSON read with care, shapes checked with the file's name."""

import json
from pathlib import Path
from typing import Any

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError

# the index of a sharded checkpoint lists every tensor by name; nothing here comes near this
MAX_JSON_BYTES = 16 << 20


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: more than {MAX_JSON_BYTES} bytes of JSON")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path}: JSON nested too deeply") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def require(record: dict[str, Any], key: str, path: Path) -> Any:
    """``record[key]``, which ``path`` must have."""
    if key not in record:
        raise UserError(f"{path}: {key!r} is missing")
    return record[key]


def make_config(path: Path, **fields: Any) -> GPTConfig:
    """A GPTConfig whose errors name the file it was read from."""
    try:
        return GPTConfig(**fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def inside(folder: Path, name: object) -> Path:
    """The file ``name`` of ``folder``; a name that leads out of the folder is refused."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\:\0"):
        raise UserError(f"{folder}: {name!r} is not the name of a file in this folder")
    return folder / name
