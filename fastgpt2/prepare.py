"""``python -m fastgpt2.prepare``: tokenize a corpus of any size into token shards."""

import argparse
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastgpt2.cli import Parser, run
from fastgpt2.errors import UserError
from fastgpt2.files import atomic_folder
from fastgpt2.text.corpora import VAL_FRACTION, Corpus, Piece, load_corpus, split_pieces
from fastgpt2.text.documents import TEXT_COLUMN
from fastgpt2.text.encoding import Tokenizer
from fastgpt2.text.prepared import PreparedWriter, open_prepared
from fastgpt2.text.shards import dtype_for
from fastgpt2.text.tokenizers import get_tokenizer, load_tokenizer

# set in each worker process when it starts
_tokenizer: Tokenizer


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog="fastgpt2 prepare",
        description="Tokenize a large corpus into shards that fastgpt2 train reads as --data.",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="WHAT",
        help="files (text, .jsonl, .parquet; .gz and .zst of text and .jsonl), folders, patterns, "
        "or a corpus's name",
    )
    parser.add_argument(
        "--text-column",
        default=TEXT_COLUMN,
        metavar="NAME",
        help="where a line of JSON or a Parquet table has its text [%(default)s]",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="new folder, which appears when it is complete"
    )
    parser.add_argument(
        "--tokenizer",
        choices=("gpt2", "bytes", "char"),
        default="gpt2",
        help="what a token is: GPT-2's byte pairs, a byte, or a character [%(default)s]",
    )
    parser.add_argument(
        "--vocab-dir", metavar="DIR", help="folder with GPT-2's encoder.json and vocab.bpe"
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=VAL_FRACTION,
        metavar="X",
        help="last part of the text, kept for validation [%(default)s]",
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
        help="processes that tokenize [one per core: %(default)s]",
    )
    return parser


def prepare(
    data: list[str],
    out: str | Path,
    *,
    tokenizer: str = "gpt2",
    vocab_dir: str | None = None,
    val_fraction: float = VAL_FRACTION,
    text_column: str = TEXT_COLUMN,
    shard_tokens: int = 100_000_000,
    workers: int = 1,
) -> None:
    """Tokenize ``data`` into a new folder ``out``, which appears when it is complete.

    The text goes through in pieces of about 1 MiB, at most two a worker at a time, so memory does
    not grow with the corpus; the result does not depend on the number of workers.

    Raises:
        UserError: anything wrong with the data, or ``out`` is there and not empty.
    """
    out = Path(out)
    for flag, value in (("--shard-tokens", shard_tokens), ("--workers", workers)):
        if value < 1:
            raise UserError(f"{flag} must be positive, got {value}")
    with atomic_folder(out) as folder:
        corpus = load_corpus(data, text_column=text_column)
        chosen = get_tokenizer(tokenizer, vocab_dir=vocab_dir, text=corpus.pieces())
        writer = PreparedWriter(folder, chosen, shard_tokens=shard_tokens, source=corpus.source)
        with writer:
            _write(writer, corpus, folder, chosen, val_fraction, workers)
        # what was written must read back as it should before it gets its name
        for shards in open_prepared(folder).tokens.values():
            shards.verify()
            shards.close()
    for split, tokens in writer.tokens.items():
        print(
            f"{split}: {tokens:,} tokens of {writer.bytes[split]:,} bytes in "
            f"{len(writer.files[split])} shard(s)"
        )
    print(f"train on them: python -m fastgpt2.train --data {out}")


def _write(
    writer: PreparedWriter,
    corpus: Corpus,
    folder: Path,
    tokenizer: Tokenizer,
    val_fraction: float,
    workers: int,
) -> None:
    pieces = split_pieces(corpus, val_fraction)
    dtype = dtype_for(tokenizer.vocab_size)
    with tqdm(total=corpus.size, unit="B", unit_scale=True, desc="tokenizing") as bar:
        for piece, ids in _encoded(pieces, folder, workers):
            if piece.after_document and tokenizer.eot is not None:
                writer.write(piece.split, np.array([tokenizer.eot], dtype), 0)
            size = len(piece.text.encode("utf-8"))
            writer.write(piece.split, ids, size)
            bar.update(size)


def _encoded(
    pieces: Iterator[Piece], tokenizer_folder: Path, workers: int
) -> Iterator[tuple[Piece, NDArray[Any]]]:
    """Each piece with its ids, in order, encoded by ``workers`` processes."""
    pool = ProcessPoolExecutor(
        workers,
        # the one start method that every system has, and that threads cannot harm
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(str(tokenizer_folder),),
    )
    waiting: deque[tuple[Piece, Future[NDArray[Any]]]] = deque()
    try:
        for piece in pieces:
            # submitting starts the processes
            with _interrupts_later():
                waiting.append((piece, pool.submit(_encode, piece.text)))
            if len(waiting) >= 2 * workers:
                piece, future = waiting.popleft()
                yield piece, future.result()
        for piece, future in waiting:
            yield piece, future.result()
    except BrokenProcessPool as error:
        raise UserError("a tokenizing process was killed (out of memory?)") from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Keep Ctrl-C until the end of the block, and from the processes that are started in it.

    A terminal sends it to the whole group: the main process alone is to answer it, and not with a
    worker half started.
    """
    if threading.current_thread() is not threading.main_thread():
        # only the main thread is interrupted, and only it may set a handler
        yield
        return
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    if sys.platform != "win32":
        # what is blocked stays blocked in a new process
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _start_worker(tokenizer_folder: str) -> None:
    global _tokenizer
    # for Windows, where nothing is inherited
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _tokenizer = load_tokenizer(tokenizer_folder)


def _encode(text: str) -> NDArray[Any]:
    return np.array(_tokenizer.encode(text), dtype_for(_tokenizer.vocab_size))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = build_parser().parse_args(argv)
    return run("prepare", lambda: prepare(**vars(args)))


if __name__ == "__main__":
    sys.exit(main())
