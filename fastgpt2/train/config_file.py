"""Configurations in TOML: those that are shipped, by name, and a user's own files."""

import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastgpt2.config import unknown_key
from fastgpt2.errors import UserError
from fastgpt2.text.pipes import waiting_for
from fastgpt2.train.config import MUON_TABLE, field_types

_TYPE_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    tuple: "a string or a list of strings",
}


def named_configs() -> list[str]:
    """Names that ``--config`` knows."""
    folder = files("fastgpt2.configs")
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def read_config(name_or_path: str) -> dict[str, Any]:
    """The values of a configuration, checked for unknown keys and types.

    Args:
        name_or_path: one of ``named_configs``, or a TOML file.

    Raises:
        UserError: it cannot be read, is not TOML, or a key or a value is not ``TrainConfig``'s.
    """
    path = Path(name_or_path)
    if name_or_path in named_configs():
        text = (files("fastgpt2.configs") / f"{name_or_path}.toml").read_text(encoding="utf-8")
    elif path.is_file() or path.is_fifo():
        try:
            # some editors begin a file with a byte-order mark, which TOML does not allow
            with waiting_for(name_or_path):
                text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
    elif path.exists():
        raise UserError(f"config {name_or_path!r}: not a file")
    else:
        raise UserError(
            f"config {name_or_path!r}: no such file, and none of {', '.join(named_configs())}"
        )
    try:
        values = tomllib.loads(text)
    # a number of too many digits is a plain ValueError; arrays may be nested too deeply
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name_or_path}: not valid TOML: {str(error)[:200]}") from None
    table = values.pop(MUON_TABLE, None)
    typed = {key: _typed(name_or_path, key, value) for key, value in values.items()}
    if table is not None:
        where = f"{name_or_path}, [{MUON_TABLE}]"
        if not isinstance(table, dict):
            raise UserError(f"{name_or_path}: {MUON_TABLE} must be a table, got {table!r}")
        typed[MUON_TABLE] = {key: _typed(where, key, value) for key, value in table.items()}
    return typed


def _typed(where: str, key: str, value: Any) -> Any:
    known = field_types()
    if key not in known:
        raise unknown_key(key, list(known), where)
    expected, _ = known[key]
    if key == "batch_size" and value == "auto":
        return value
    if expected is tuple:
        value = (value,) if isinstance(value, str) else value
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif expected is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    elif type(value) is expected:
        return value
    raise UserError(f"{where}: {key} must be {_TYPE_NAMES[expected]}, got {value!r}")
