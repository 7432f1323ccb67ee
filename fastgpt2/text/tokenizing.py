"""Encode pieces of text, with several processes."""

import multiprocessing
import os
import signal
import sys
import threading
import time
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

from fastgpt2 import streams
from fastgpt2.errors import UserError
from fastgpt2.text.corpora import Piece
from fastgpt2.text.encoding import Tokenizer
from fastgpt2.text.prepared import PreparedWriter
from fastgpt2.text.shards import dtype_for
from fastgpt2.text.tokenizers import load_tokenizer

# set when a worker process starts
_tokenizer: Tokenizer


def write_pieces(
    writer: PreparedWriter,
    pieces: Iterator[Piece],
    folder: Path,
    tokenizer: Tokenizer,
    *,
    workers: int,
    total: int,
) -> str:
    """Encode ``pieces`` and write them in order; returns a line about the speed.

    About two pieces per worker are in memory at a time.

    Args:
        writer: takes the ids.
        pieces: the text.
        folder: where the tokenizer is saved.
        tokenizer: that tokenizer.
        workers: processes that encode.
        total: bytes of all pieces, for the progress bar.

    Raises:
        UserError: the text cannot be read, or a process was killed.
    """
    dtype = dtype_for(tokenizer.vocab_size)
    began, done = time.perf_counter(), 0
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="tokenizing", delay=streams.BAR_DELAY
    ) as bar:
        for piece, ids in _encoded(pieces, folder, tokenizer, workers):
            if piece.after_document and tokenizer.eot is not None:
                writer.write(piece.split, np.array([tokenizer.eot], dtype), 0)
            writer.write(piece.split, ids, piece.size)
            done += piece.size
            bar.update(piece.size)
    seconds = time.perf_counter() - began
    return (
        f"{done / 1e6:,.1f} MB of text in {seconds:,.1f} s, {done / 1e6 / seconds / workers:.2f} "
        f"MB/s a core ({workers} process{'es' if workers > 1 else ''})"
    )


def _encoded(
    pieces: Iterator[Piece], folder: Path, tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Piece, NDArray[Any]]]:
    """Each piece with its ids, in order; one worker means this process, more are started."""
    if workers == 1:
        dtype = dtype_for(tokenizer.vocab_size)
        yield from ((piece, np.array(tokenizer.encode(piece.text), dtype)) for piece in pieces)
        return
    pool = ProcessPoolExecutor(
        workers,
        # the only start method that every system has and that is safe with threads
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(str(folder),),
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
    """Delay Ctrl-C until the end of the block, and hide it from processes started in it.

    A terminal sends Ctrl-C to the whole process group. Only the main process must answer it, and
    not while a worker is half started.
    """
    if threading.current_thread() is not threading.main_thread():
        # only the main thread receives signals and may set a handler
        yield
        return
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    if sys.platform != "win32":
        # a new process inherits the mask
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
    # Windows inherits no mask
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer = load_tokenizer(tokenizer_folder)


def _end_with_parent() -> None:
    # a process that is killed tells its workers nothing, and they would wait for text for ever
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(text: str) -> NDArray[Any]:
    return np.array(_tokenizer.encode(text), dtype_for(_tokenizer.vocab_size))
