"""``python -m fastgpt2.evaluate``: how well models predict a text, or do a task."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from fastgpt2 import distributed
from fastgpt2.cli import Parser, file_name, file_path
from fastgpt2.cli import run as run_command
from fastgpt2.config import IMPLS
from fastgpt2.devices import (
    DTYPES,
    device_name,
    of_this_process,
    resolve_device,
    resolve_dtype,
    resolve_kernels,
)
from fastgpt2.errors import UserError
from fastgpt2.evaluate import report
from fastgpt2.evaluate.bars import progress
from fastgpt2.evaluate.data import SPLITS, Documents, Ids, Shards, Text, open_data
from fastgpt2.evaluate.detokenizers import DETOKENIZERS
from fastgpt2.evaluate.perplexity import score_text
from fastgpt2.evaluate.tasks import (
    TASKS,
    Metrics,
    fetch,
    is_published,
    read_examples,
    score_task,
)
from fastgpt2.evaluate.windows import Windows
from fastgpt2.files import new_folders
from fastgpt2.opener import OpenedModel, open_model
from fastgpt2.text import IdTokenizer, Tokenizer, get_tokenizer
from fastgpt2.text.documents import TEXT_COLUMN
from fastgpt2.train.summary import dtype_name
from fastgpt2.weights import RELEASES

# flags that apply to text only
_TEXT_FLAGS = ("text_column", "context", "stride", "split", "detokenizer")


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog="fastgpt2 evaluate",
        description="Score models on a text (cross-entropy, perplexity, bits per byte) or a task. "
        "Under torchrun the processes share the work.",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        type=file_name,
        help="run folder, a folder or file in any format that convert reads, or one of "
        + ", ".join(RELEASES),
    )
    what = parser.add_argument_group("what")
    what.add_argument(
        "--task", choices=("text", *TASKS), default="text", help="what to score on [%(default)s]"
    )
    what.add_argument(
        "--data",
        nargs="+",
        metavar="WHAT",
        type=file_name,
        help="files (text, .jsonl or .ndjson, .parquet; .gz and .zst of the first two), folders, "
        "patterns, names of corpora, a folder of token shards, or token files of llm.c or "
        "nanoGPT; for a task, its JSON Lines file [downloaded]",
    )
    what.add_argument(
        "--limit", type=int, metavar="N", help="score only the first N tokens or examples [all]"
    )
    what.add_argument(
        "--out",
        type=file_path,
        metavar="DIR",
        help="folder for a JSON record, a table and a picture",
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text-column",
        metavar="NAME",
        help=f"key of a JSON line, or column of a Parquet table, with the text [{TEXT_COLUMN}]",
    )
    text.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens per window; the last is only predicted [the model's block_size]",
    )
    text.add_argument(
        "--stride", type=int, metavar="N", help="tokens between windows [half the context]"
    )
    text.add_argument(
        "--split",
        choices=SPLITS,
        help="part of the data, as train splits it [all of a text; val for tokens]",
    )
    text.add_argument(
        "--detokenizer",
        choices=DETOKENIZERS,
        help="first undo the tokenization of this benchmark [none]",
    )
    models = parser.add_argument_group("models")
    models.add_argument(
        "--checkpoint",
        choices=("best", "latest"),
        default="best",
        help="of a run: the one with the lowest validation loss, or the newest [%(default)s]",
    )
    models.add_argument(
        "--tokenizer", choices=("gpt2", "bytes"), help="for a model without a tokenizer"
    )
    models.add_argument(
        "--vocab-dir",
        type=file_path,
        metavar="DIR",
        help="folder with GPT-2's encoder.json and vocab.bpe",
    )
    models.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="number of ids, for token files whose tokenizer is unknown",
    )
    models.add_argument("--offline", action="store_true", help="do not use the network")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="sequences per batch [%(default)s]"
    )
    machine.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, ... [auto]"
    )
    machine.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="compute dtype [%(default)s]"
    )
    machine.add_argument(
        "--impl", choices=IMPLS, default="auto", help="implementation of the kernels [%(default)s]"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = build_parser().parse_args(argv)

    def body() -> None:
        with distributed.process_group():
            _evaluate(arguments)

    # with --out, writing the report matters more than the terminal
    return run_command("evaluate", body, steady=arguments.out is not None)


def _evaluate(arguments: argparse.Namespace) -> None:
    _check(arguments)
    device = of_this_process(resolve_device(arguments.device))
    dtype = resolve_dtype(arguments.dtype, device)
    resolve_kernels(device, dtype, arguments.impl)
    run = _evaluate_text if arguments.task == "text" else _evaluate_task
    # a folder that cannot be created is refused before any work is done
    with nullcontext() if arguments.out is None else new_folders(arguments.out):
        run(arguments, device, dtype)


def _check(arguments: argparse.Namespace) -> None:
    for name in ("limit", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if arguments.task == "text":
        if arguments.data is None:
            raise UserError("--data: give a text to score, or --task hellaswag or lambada")
        return
    for name in _TEXT_FLAGS:
        if getattr(arguments, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is for text, not for --task {arguments.task}"
            )
    if arguments.data is not None and len(arguments.data) > 1:
        raise UserError(f"--data: --task {arguments.task} takes one file")


def _evaluate_text(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    detokenizer = arguments.detokenizer or "none"
    source = open_data(
        arguments.data,
        split=arguments.split,
        detokenizer=detokenizer,
        text_column=arguments.text_column or TEXT_COLUMN,
    )
    candidates = _candidates(arguments, source.tokenizer)
    # check everything, and tokenize once per tokenizer, before the first model is read
    texts: dict[str, Text] = {}
    windows = {}
    for candidate in candidates:
        tokenizer = candidate.tokenizer
        if tokenizer.fingerprint not in texts:
            texts[tokenizer.fingerprint] = source.tokenize(tokenizer).first(arguments.limit)
        context, stride = arguments.context, arguments.stride
        if context is None:
            context = candidate.config.block_size
        if stride is None:
            stride = max(1, context // 2)
        length = len(texts[tokenizer.fingerprint].tokens)
        windows[candidate.name] = Windows(length, context, stride, candidate.config.block_size)
    protocol = _protocol(arguments, device, dtype) | _text_protocol(arguments, source, texts)
    _say(report.protocol_lines(protocol))
    scores = {}
    for candidate in _with_bar(candidates):
        scores[candidate.name] = score_text(
            candidate.load(device, torch.float32, arguments.impl),
            texts[candidate.tokenizer.fingerprint],
            windows[candidate.name],
            batch_size=arguments.batch_size,
            dtype=dtype,
        )
    with _shown(report.text_table(scores), arguments.out) as out:
        if out is not None:
            report.write_text_report(out, protocol, scores)


def _evaluate_task(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    task = TASKS[arguments.task]
    if arguments.data is None:
        path = fetch(task, offline=arguments.offline)
    else:
        path = Path(arguments.data[0])
    examples = read_examples(task, path, arguments.limit)
    candidates = _candidates(arguments, None)
    published = "the published file" if is_published(task, path) else "not the published file"
    protocol = _protocol(arguments, device, dtype) | {
        "data": f"{path} ({published}, by its sha256)",
        "examples": f"{len(examples):,}",
        "protocol": task.protocol,
        "standard error": "of the mean over the examples",
    }
    _say(report.protocol_lines(protocol))
    results: dict[str, Metrics] = {}
    for candidate in _with_bar(candidates):
        results[candidate.name] = score_task(
            task,
            examples,
            candidate.load(device, torch.float32, arguments.impl),
            candidate.tokenizer,
            batch_size=arguments.batch_size,
            dtype=dtype,
        )
    with _shown(report.task_table(results), arguments.out) as out:
        if out is not None:
            report.write_task_report(out, protocol, results, task.chance)


def _candidates(arguments: argparse.Namespace, of_data: Tokenizer | None) -> list[OpenedModel]:
    """The models; one without a tokenizer gets the flags' tokenizer, else the data's."""
    fallback = of_data
    if arguments.vocab_size is not None:
        fallback = IdTokenizer(arguments.vocab_size)
    elif arguments.tokenizer or arguments.vocab_dir:
        fallback = get_tokenizer(arguments.tokenizer or "gpt2", vocab_dir=arguments.vocab_dir)
    candidates: list[OpenedModel] = []
    for name in arguments.models:
        if name in (candidate.name for candidate in candidates):
            raise UserError(f"{name}: given twice")
        candidates.append(
            open_model(
                name,
                tokenizer=fallback,
                checkpoint=arguments.checkpoint,
                offline=arguments.offline,
            )
        )
    return candidates


def _protocol(
    arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> report.Protocol:
    return {
        "task": arguments.task,
        "machine": f"{device_name(device)}, {dtype_name(dtype)}, PyTorch {torch.__version__}, "
        f"processes: {distributed.world_size()}",
    }


def _text_protocol(
    arguments: argparse.Namespace, source: Documents | Shards | Ids, texts: dict[str, Text]
) -> report.Protocol:
    counts = (f"{len(t.tokens):,} {t.tokenizer.name} tokens" for t in texts.values())
    part = "" if arguments.limit is None else f", the first {arguments.limit:,} tokens of it"
    words = next(iter(texts.values())).words
    unit = DETOKENIZERS[source.detokenizer].unit
    return {
        "data": f"{source.source} (split {source.split}{part})",
        "tokens": "; ".join(counts) + "; the table has how many were scored",
        "detokenizer": source.detokenizer,
        "windows": "`context` tokens each, one every `stride` tokens; a token is scored in the "
        "first window that holds it, unless that window begins with it",
        "normaliser": "nats/token: the tokens scored; bits/byte: their UTF-8 bytes, none for "
        "<|endoftext|>"
        + ("" if words is None else f"; word-perplexity: {words:,} {unit} of the original text"),
    }


def _with_bar(candidates: list[OpenedModel]) -> Iterator[OpenedModel]:
    with progress(candidates, None, "model") as bar:
        for candidate in bar:
            bar.set_description(candidate.name)
            yield candidate


@contextmanager
def _shown(table: str, out: Path | None) -> Iterator[Path | None]:
    """Print the results after the block, which writes them to the folder it is given, if any.

    Results are saved first, then shown, and shown even if they could not be saved.
    """
    try:
        yield None if distributed.rank() else out
    finally:
        _say(f"\n{table}")
    if out is not None:
        _say(f"\nreport: {out}")


def _say(text: str) -> None:
    """Print from one process only."""
    if not distributed.rank():
        print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
