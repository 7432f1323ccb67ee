"""The prompts: one on the command line, or a file of them, one per line."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fastgpt2.errors import UserError
from fastgpt2.files import naming
from fastgpt2.generate.checks import check_prompt, split_stops
from fastgpt2.generate.options import Options
from fastgpt2.generate.processors import require
from fastgpt2.generate.text import encode_prompt
from fastgpt2.opener import OpenedModel
from fastgpt2.text.pipes import waiting_for
from fastgpt2.text.utf8 import Utf8Decoder


@dataclass(frozen=True)
class Job:
    """One prompt, and how it is continued.

    Attributes:
        prompt: text, or token ids.
        options: how its texts are generated.
        index: its line in the input, from 0.
        id: the user's name for it, if any.
        place: where it was read, for error messages; empty for the command line.
    """

    prompt: str | list[int]
    options: Options
    index: int = 0
    id: str | int | None = None
    place: str = ""

    def check(self, model: OpenedModel, window: str) -> None:
        """Refuse a prompt that the model cannot continue, before its weights are read.

        Args:
            model: the opened model.
            window: what happens when a text outgrows its context.

        Raises:
            UserError: the prompt, a stop, or an id of the bias does not fit; names the line.
        """
        try:
            if isinstance(self.prompt, str):
                ids = encode_prompt(model.tokenizer, self.prompt)
            else:
                ids = self.prompt
            check_prompt(model, ids, window)
            split_stops(model, self.options.stop)
            vocab_size = model.config.vocab_size
            for id_ in self.options.logit_bias or ():
                require("logit_bias: an id", id_, id_ < vocab_size, f"in [0, {vocab_size})")
            for id_ in () if isinstance(self.prompt, str) else ids:
                # ids that only pad the model's vocabulary have no text
                known = model.tokenizer.vocab_size
                require("prompt: an id", id_, id_ < known, f"in [0, {known}), the tokenizer's")
        except UserError as error:
            raise UserError(f"{self.place}{error}") from None


def read_jobs(source: str, options: Options, *, only_text: bool = False) -> list[Job]:
    """The prompts of a file, one per line; blank lines are left out.

    If the first line begins with ``{``, or the name ends with ``.jsonl``, the file is JSON Lines:
    each line is an object with ``prompt`` or ``ids``, optionally an ``id``, and any of the options.
    Otherwise each line is a prompt.

    Args:
        source: the file; ``-`` is stdin.
        options: the options of every line, unless it overrides them.
        only_text: a line of JSON may hold no options.

    Raises:
        UserError: the file is not UTF-8 text, has no prompts, or a line is not valid.
        OSError: the file cannot be read.
    """
    lines = _read(source).split("\n")
    numbered = [(i, line.removesuffix("\r")) for i, line in enumerate(lines) if line.strip()]
    if not numbered:
        raise UserError(f"--input {source}: holds no prompt")
    if not (source.lower().endswith(".jsonl") or numbered[0][1].lstrip().startswith("{")):
        return [Job(line, options, i, None, _place(source, i)) for i, line in numbered]
    return [
        _parse(line, options, i, _place(source, i), only_text=only_text) for i, line in numbered
    ]


def _read(source: str) -> str:
    if source == "-":
        if sys.stdin is None:
            raise UserError("--input -: stdin is closed")
        # a test's stand-in for stdin may hold text alone
        data = getattr(sys.stdin, "buffer", sys.stdin).read()
        data = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
    else:
        with naming(Path(source)), waiting_for(source):
            data = Path(source).read_bytes()
    try:
        return Utf8Decoder(source).decode(data, final=True)
    except UserError as error:
        raise UserError(f"--input: {str(error).removeprefix('data: ')}") from None


def _place(source: str, index: int) -> str:
    return f"--input {source}, line {index + 1}: "


def _parse(line: str, options: Options, index: int, place: str, *, only_text: bool) -> Job:
    try:
        record = json.loads(line, parse_constant=_refuse, object_pairs_hook=_once)
    except UserError as error:
        raise UserError(f"{place}{error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}not JSON ({str(error)[:80]})") from None
    if not isinstance(record, dict) or ("prompt" in record) == ("ids" in record):
        raise UserError(f"{place}expected an object with either 'prompt' or 'ids'")
    try:
        return _job(record, options, index, place, only_text=only_text)
    except UserError as error:
        raise UserError(f"{place}{error}") from None


def _job(
    record: dict[str, Any], options: Options, index: int, place: str, *, only_text: bool
) -> Job:
    prompt, ids, name = (record.pop(key, None) for key in ("prompt", "ids", "id"))
    if ids is None and not isinstance(prompt, str):
        raise UserError(f"'prompt' must be a string, got {prompt!r:.80}")
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int for i in ids)):
        raise UserError(f"'ids' must be a list of integers, got {ids!r:.80}")
    if name is not None and type(name) not in (str, int):
        raise UserError(f"'id' must be a string or an integer, got {name!r:.80}")
    if only_text and record:
        raise UserError(f"--score takes no {next(iter(record))!r:.80}")
    return Job(prompt if ids is None else ids, options.replaced(record), index, name, place)


def _refuse(constant: str) -> NoReturn:
    raise UserError(f"not JSON ({constant} is not a number of JSON)")


def _once(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UserError(f"{key!r:.80} is given twice")
        found[key] = value
    return found


def samples(jobs: list[Job]) -> Iterator[tuple[Job, int]]:
    """One item per text to generate: its job, and the number of the sample."""
    for job in jobs:
        for sample in range(job.options.samples):
            yield job, sample
