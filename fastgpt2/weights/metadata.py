"""The small files beside the weights: JSON read with care, shapes checked with the file's name."""

import stat
from pathlib import Path
from reprlib import Repr
from typing import Any

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.files import parse_json

# the index of a sharded checkpoint lists every tensor by name; nothing here comes near this
MAX_JSON_BYTES = 16 << 20


# a forged name or value can be as long as its file, a message cannot
_BRIEF = Repr()
_BRIEF.maxstring = 200

# what no size, rate or name of a configuration comes near
_MAX_NUMBER, _MAX_TEXT = 2**63, 100


def shown(value: object) -> str:
    """``repr`` of what a file says, its middle left out where it is long."""
    return _BRIEF.repr(value)


def file_size(path: Path) -> int:
    """Bytes of a regular file; a pipe or a device would be read without an end.

    Raises:
        UserError: it is none.
        OSError: there is nothing.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: not a regular file")
    return found.st_size


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        UserError: the file cannot be read, or holds something else.
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
        # a pickle's list can hold itself thirty times over: it must not even reach a message
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
    """The file ``name`` of ``folder``; a name that leads out of the folder is refused."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\:\0"):
        raise UserError(f"{folder}: {shown(name)} is not the name of a file in this folder")
    return folder / name
