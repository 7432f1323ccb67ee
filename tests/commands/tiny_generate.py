"""``fastgpt2 generate`` over a tiny model, in this process."""

import io
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fastgpt2.generate.__main__ import main
from fastgpt2.text import BytesTokenizer, save_tokenizer
from tests.tiny_gpt import tiny_gpt


def save_tiny(folder: Path) -> Path:
    """A model of bytes with a window of 16; its texts end now and then."""
    tiny_gpt(vocab_size=257, n_layer=1, n_head=1, n_embd=8).save_pretrained(folder)
    save_tokenizer(BytesTokenizer(), folder)
    return folder


def generate(model: Path, *flags: str, typed: bytes = b"", code: int = 0) -> None:
    """Run the command, with ``typed`` on stdin."""
    stdin = io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8")
    with patch.object(sys, "stdin", stdin):
        assert main(["--model", str(model), "--max-new-tokens", "9", "--seed", "5", *flags]) == code


def records(path: Path) -> list[dict[str, Any]]:
    """The results in a file, by index and sample."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(found, key=lambda record: (record["index"], record.get("sample", 0)))
