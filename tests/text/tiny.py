"""A vocabulary of GPT-2's kind that needs no network, and where larger things may be found."""

import json
from pathlib import Path

from fastgpt2.text.encoding import END_OF_TEXT

# merges of a vocabulary that is small enough to work out by hand; "Ġ" is how GPT-2 spells a space
MERGES = ["t h", "th e", "Ġ the", "i n", "Ġ t", "a n", "an d", "Ġ and", "Ċ Ċ", "Ġ Ġ"]
BESIDE_THE_REPOSITORY = Path(__file__).parents[2].parent / "shared"


def tiny_files() -> tuple[str, str]:
    """The text of an ``encoder.json`` and a ``vocab.bpe`` that belong together."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    spelling = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*spelling, *(merge.replace(" ", "") for merge in MERGES), END_OF_TEXT]
    encoder = json.dumps({token: id_ for id_, token in enumerate(tokens)})
    return encoder, "\n".join(["#version: 0.2", *MERGES, ""])
