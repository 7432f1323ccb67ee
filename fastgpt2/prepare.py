"""``python -m fastgpt2.prepare``: tokenize a corpus of any size into token shards."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgpt2.cli import Parser, file_name, quoted, run
from fastgpt2.errors import UserError
from fastgpt2.files import atomic_folder
from fastgpt2.text.corpora import VAL_FRACTION, load_corpus, split_pieces
from fastgpt2.text.dataset import Dataset, build_dataset, refuse_vocab_size
from fastgpt2.text.documents import TEXT_COLUMN
from fastgpt2.text.mixture import refuse_weights
from fastgpt2.text.parts import Part, merge_parts, parse_part, prepare_part
from fastgpt2.text.prepared import FILE_NAME as MANIFEST
from fastgpt2.text.prepared import PreparedWriter, find_prepared
from fastgpt2.text.stored import StoredTokens
from fastgpt2.text.token_files import find_token_files
from fastgpt2.text.token_formats import TOKEN_FORMATS
from fastgpt2.text.tokenizers import get_tokenizer
from fastgpt2.text.tokenizing import write_pieces


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog="fastgpt2 prepare",
        description="Tokenize a corpus of any size into token shards, which fastgpt2 train reads "
        "as --data, or into token files of llm.c or nanoGPT. Token files are converted.",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        type=file_name,
        metavar="WHAT",
        help="files (text, .jsonl or .ndjson, .parquet; .gz and .zst of the first two), folders, "
        "patterns, names of corpora, a folder of token shards, or token files of llm.c or "
        "nanoGPT",
    )
    parser.add_argument(
        "--text-column",
        default=TEXT_COLUMN,
        metavar="NAME",
        help="key of a JSON line, or column of a Parquet table, with the text [%(default)s]",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        type=file_name,
        help="new folder; it appears when it is complete",
    )
    parser.add_argument(
        "--part",
        type=parse_part,
        metavar="I/N",
        help="do only part I of N, into --out: run one call per part, on any machine, in any "
        "order; finished parts are skipped",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="check all parts in --out and join them into the folder that train reads",
    )
    parser.add_argument(
        "--tokenizer",
        choices=("gpt2", "bytes", "char"),
        help="a token is one of GPT-2's byte pairs, a byte, or a character [gpt2; for token files, "
        "the tokenizer saved beside them]",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="number of ids, for token files whose tokenizer is unknown",
    )
    parser.add_argument(
        "--to",
        choices=tuple(TOKEN_FORMATS),
        default="fastgpt2",
        help="format: fastgpt2's shards, llm.c's train_000000.bin ..., or nanoGPT's train.bin and "
        "val.bin [%(default)s]",
    )
    parser.add_argument(
        "--vocab-dir",
        metavar="DIR",
        type=file_name,
        help="folder with GPT-2's encoder.json and vocab.bpe",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=VAL_FRACTION,
        metavar="X",
        help="share of the text, at its end, kept for validation [%(default)s]",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=100_000_000,
        metavar="N",
        help="tokens per shard [%(default)s]",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="number of processes [one per core: %(default)s]",
    )
    return parser


def prepare(
    data: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    to: str = "fastgpt2",
    vocab_dir: str | None = None,
    val_fraction: float = VAL_FRACTION,
    text_column: str = TEXT_COLUMN,
    shard_tokens: int = 100_000_000,
    workers: int = 1,
    part: Part | None = None,
) -> None:
    """Tokenize ``data`` into a new folder ``out``, which appears when it is complete.

    The text is read in pieces of about 1 MiB, at most two per worker at a time, so memory does not
    grow with the corpus. The result does not depend on the number of workers. Data that are tokens
    already keep their ids and splits.

    Args:
        data: what ``build_dataset`` takes.
        out: the new folder.
        tokenizer: ``gpt2``, ``bytes`` or ``char``; None means GPT-2's, or the tokens' own.
        vocab_size: V of token files whose tokenizer is not known.
        to: a name in ``TOKEN_FORMATS``.
        vocab_dir: folder with GPT-2's vocabulary files.
        val_fraction: share of the text, at its end, kept for validation.
        text_column: key of a JSON line, or column of a table, that holds the text.
        shard_tokens: ids per file.
        workers: processes that tokenize.
        part: do only this part of the work; ``merge_parts`` joins all parts.

    Raises:
        UserError: anything wrong with the data, or ``out`` exists and is not empty.
    """
    out = Path(out)
    for flag, value in (("--shard-tokens", shard_tokens), ("--workers", workers)):
        if value < 1:
            raise UserError(f"{flag} must be positive, got {value}")
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction must be in [0, 1), got {val_fraction}")
    refuse_weights(data, "prepare")
    if part is not None:
        if to != "fastgpt2" or find_prepared(data) or find_token_files(data):
            raise UserError(
                "--part tokenizes text into fastgpt2's shards; tokens, and --to, are for a call of "
                "their own: prepare --data MERGED --to ..."
            )
        refuse_vocab_size(vocab_size)
        prepare_part(
            data,
            out,
            part,
            tokenizer=tokenizer or "gpt2",
            vocab_dir=vocab_dir,
            val_fraction=val_fraction,
            text_column=text_column,
            shard_tokens=shard_tokens,
            workers=workers,
        )
        return
    with atomic_folder(out, last=(MANIFEST,)) as folder:
        options: dict[str, Any] = {"shard_tokens": shard_tokens, "to": to}
        if find_prepared(data) or find_token_files(data):
            dataset = build_dataset(
                data,
                tokenizer or "auto",
                vocab_dir=vocab_dir,
                val_fraction=val_fraction,
                vocab_size=vocab_size,
                notify=print,
            )
            writer = PreparedWriter(folder, dataset.tokenizer, source=dataset.source, **options)
            with writer:
                _copy(writer, dataset)
        else:
            refuse_vocab_size(vocab_size)
            corpus = load_corpus(data, text_column=text_column, notify=print)
            chosen = get_tokenizer(tokenizer or "gpt2", vocab_dir=vocab_dir, text=corpus.pieces())
            writer = PreparedWriter(folder, chosen, source=corpus.source, **options)
            with writer:
                speed = write_pieces(
                    writer,
                    split_pieces(corpus, val_fraction),
                    folder,
                    chosen,
                    workers=workers,
                    total=corpus.size,
                )
            print(speed)
        # read everything back before the folder gets its name
        writer.verify()
    for split, tokens in writer.tokens.items():
        print(
            f"{split}: {tokens:,} tokens of {writer.bytes[split]:,} bytes in "
            f"{len(writer.files[split])} {'shard' if to == 'fastgpt2' else 'file'}(s)"
        )
    print(f"train on them: python -m fastgpt2.train --data {quoted(out)}")


def _copy(writer: PreparedWriter, dataset: Dataset) -> None:
    """Write the tokens unchanged."""
    for split, tokens, size in (
        ("train", dataset.train, dataset.train_bytes),
        ("val", dataset.val, dataset.val_bytes),
    ):
        assert tokens is None or isinstance(tokens, StoredTokens)
        for ids in () if tokens is None else tokens.blocks():
            writer.write(split, ids, size)
            size = 0


def _run(arguments: dict[str, Any]) -> None:
    if arguments.pop("merge"):
        # the number of processes changes nothing
        defaults = vars(build_parser().parse_args([f"--out={arguments['out']}"]))
        given = [
            name
            for name, value in arguments.items()
            if name != "workers" and value != defaults[name]
        ]
        if given:
            flag = f"--{given[0].replace('_', '-')}"
            raise UserError(f"--merge takes the parts in --out: give no {flag}")
        merge_parts(Path(arguments["out"]))
    elif arguments["data"] is None:
        raise UserError("--data: give a corpus, or --merge")
    else:
        prepare(**arguments)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = build_parser().parse_args(argv)
    return run("prepare", lambda: _run(vars(args)), steady=True)


if __name__ == "__main__":
    sys.exit(main())
