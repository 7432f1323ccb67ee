"""HellaSwag and LAMBADA (OpenAI's variant), from their published JSON Lines files."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt2 import units
from fastgpt2.download import DownloadError, cache_dir, download
from fastgpt2.errors import UserError
from fastgpt2.evaluate.continuations import Likelihoods, Request, score_continuations
from fastgpt2.files import parse_json, sha256_of
from fastgpt2.model import GPT
from fastgpt2.text.corpora import RemoteText
from fastgpt2.text.encoding import Tokenizer
from fastgpt2.text.utf8 import is_utf8


@dataclass(frozen=True)
class Example:
    """A context and its possible continuations; ``label`` is the index of the right one."""

    context: str
    continuations: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Metric:
    """A mean and its standard error."""

    value: float
    stderr: float


Metrics = dict[str, Metric]


@dataclass(frozen=True)
class Task:
    """A task: how its file is read and what is measured.

    ``example`` takes a line's JSON object, ``measure`` the likelihoods of the examples, (examples,
    continuations) each, and their labels.
    """

    name: str
    remote: RemoteText
    protocol: str
    chance: float
    example: Callable[[dict[str, Any]], Example]
    measure: Callable[[Likelihoods, list[int]], Metrics]


def _text(value: Any, name: str) -> str:
    """``value``, if it is text that a tokenizer accepts."""
    if not isinstance(value, str) or not is_utf8(value):
        raise ValueError(f"{name} must be text, got {value!r:.80}")
    return value


def _hellaswag_example(record: dict[str, Any]) -> Example:
    context, endings, label = record["ctx"], record["endings"], record["label"]
    if not isinstance(endings, list) or len(endings) != 4 or not 0 <= int(label) < 4:
        raise ValueError("expected 4 endings and the label of one of them")
    continuations = tuple(f" {_text(ending, 'an ending')}" for ending in endings)
    return Example(_text(context, "ctx"), continuations, int(label))


def _hellaswag_metrics(scores: Likelihoods, labels: list[int]) -> Metrics:
    total = scores.nll.reshape(len(labels), -1)
    mean = total / scores.tokens.reshape(total.shape)
    return {
        "accuracy": _mean(total.argmin(axis=1) == labels),
        "accuracy_norm": _mean(mean.argmin(axis=1) == labels),
    }


def _lambada_example(record: dict[str, Any]) -> Example:
    context, space, word = _text(record["text"], "text").rpartition(" ")
    if not context.strip() or not word:
        raise ValueError("expected a text that ends in a word after a space")
    return Example(context, (space + word,), 0)


def _lambada_metrics(scores: Likelihoods, labels: list[int]) -> Metrics:
    loss = _mean(scores.nll)
    perplexity = units.perplexity(loss.value)
    return {
        "accuracy": _mean(scores.greedy),
        # perplexity of the last word; to first order, the error of exp(x) is exp(x) times that of x
        "perplexity": Metric(perplexity, perplexity * loss.stderr),
    }


def _mean(values: Any) -> Metric:
    """Mean and sample standard error; the error is NaN for a single value."""
    values = np.asarray(values, np.float64)
    n = len(values)
    stderr = values.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return Metric(float(values.mean()), float(stderr))


TASKS = {
    "hellaswag": Task(
        "hellaswag",
        # Zellers et al., 2019; digest and size as in TensorFlow Datasets' url_checksums
        RemoteText(
            "hellaswag_val.jsonl",
            ("https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",),
            "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
            12_246_618,
        ),
        "zero-shot; context ctx, then a space and each of the 4 endings; accuracy takes the ending "
        "of the largest log-likelihood, accuracy_norm that of the largest per token of the ending "
        "(llm.c's definition; lm-eval divides by characters and words its prompt otherwise)",
        0.25,
        _hellaswag_example,
        _hellaswag_metrics,
    ),
    "lambada": Task(
        "lambada",
        # Paperno et al., 2016, as OpenAI prepared it; digest as in lm-eval's first LAMBADA task
        RemoteText(
            "lambada_test.jsonl",
            ("https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",),
            "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
            1_819_752,
        ),
        "OpenAI's variant, zero-shot; the last word, with the space before it, after all that "
        "precedes; accuracy counts words whose tokens are all the likeliest ones, no stop-word "
        "filter; perplexity is of the word (as in lm-eval's lambada_openai)",
        0.0,
        _lambada_example,
        _lambada_metrics,
    ),
}


def fetch(task: Task, *, offline: bool = False) -> Path:
    """The task's published file, downloaded once and checked.

    Raises:
        UserError: it cannot be downloaded, or ``offline`` is set and it is not in the cache.
    """
    remote = task.remote
    path = cache_dir() / "tasks" / remote.file
    if offline and not path.is_file():
        raise UserError(f"{task.name}: {path} is not there, and offline is set; give --data FILE")
    try:
        return download(remote.urls, path, sha256=remote.sha256, size=remote.size)
    except DownloadError as error:
        raise UserError(
            f"{task.name}: {remote.file} could not be downloaded ({error}); "
            "give the file: --data FILE"
        ) from error


def is_published(task: Task, path: Path) -> bool:
    """Whether the file is the published one, by its sha256."""
    if not path.is_file():
        # a pipe can be read only once, and the examples were read from it
        return False
    return sha256_of(path) == task.remote.sha256


def read_examples(task: Task, path: Path, limit: int | None = None) -> list[Example]:
    """The examples in a file, at most ``limit``.

    Raises:
        UserError: the file cannot be read or is empty, or a line is not in the published format.
    """
    examples: list[Example] = []
    for number, line in _lines(path):
        if len(examples) == limit:
            break
        try:
            examples.append(task.example(parse_json(line)))
        except KeyError as error:
            raise UserError(
                f"{path}: line {number}: no {error} (a {task.name} file is expected)"
            ) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: line {number}: {error}") from None
    if not examples:
        raise UserError(f"{path}: no examples")
    return examples


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from ((n, line) for n, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason})") from None


def score_task(
    task: Task,
    examples: list[Example],
    model: GPT,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    dtype: torch.dtype,
) -> Metrics:
    """The task's metrics with their standard errors."""
    requests = []
    for example in examples:
        context = tokenizer.encode(example.context)
        requests += [Request(context, tokenizer.encode(c)) for c in example.continuations]
    scores = score_continuations(model, requests, batch_size=batch_size, dtype=dtype)
    return task.measure(scores, [example.label for example in examples])
