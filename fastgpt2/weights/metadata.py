"""The small files beside the weights: bounded JSON, and errors that name the file."""

import stat
from pathlib import Path
from reprlib import Repr
from typing import Any

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.files import parse_json

# far above the largest: the index of a sharded checkpoint, which lists every tensor by name
MAX_JSON_BYTES = 16 << 20


# a forged name or value can be as long as its file: shorten it in messages
_BRIEF = Repr()
_BRIEF.maxstring = 200

# far above any size, rate or name of a configuration
_MAX_NUMBER, _MAX_TEXT = 2**63, 100


def shown(value: object) -> str:
    """``repr`` of a value from a file; the middle of a long one is left out."""
    return _BRIEF.repr(value)


def file_size(path: Path) -> int:
    """Bytes of a regular file; reading a pipe or a device might never end.

    Raises:
        UserError: it is not a regular file.
        OSError: it does not exist.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: not a regular file")
    return found.st_size


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        UserError: the file cannot be read or does not hold a JSON object.
    """
    try:
        if file_size(path) > MAX_JSON_BYTES:
            raise UserError(f"{path}: more than {MAX_JSON_BYTES} bytes of JSON")
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
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
    for key, value in fields.items():
        # a pickled list can contain itself thirty times over: keep it out of messages
        if value is not None and not isinstance(value, int | float | str):
            raise UserError(f"{path}: {key} must be a plain value, got {type(value).__name__}")
        long = isinstance(value, str) and len(value) > _MAX_TEXT
        if long or (isinstance(value, int) and abs(value) >= _MAX_NUMBER):
            raise UserError(f"{path}: {key} is out of all bounds: {shown(value)}")
    try:
        return GPTConfig(**fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def inside(folder: Path, name: object) -> Path:
    """The file ``name`` in ``folder``; a name that leads out of the folder is refused."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\:\0"):
        raise UserError(f"{folder}: {shown(name)} is not the name of a file in this folder")
    return folder / name
