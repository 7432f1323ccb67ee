"""Where results go: text as it is written, JSON Lines that are never lost, a bar, the speed."""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

from tqdm import tqdm

from fastgpt2.errors import UserError
from fastgpt2.files import lock_file, naming, parse_json
from fastgpt2.generate.inputs import Job
from fastgpt2.generate.jobs import Event, Task
from fastgpt2.generate.options import Options
from fastgpt2.streams import SteadyStream

# how the line of a result begins
_BEGIN = b'{"index": '


class ResultFile:
    """JSON Lines, each of them whole and in the file before the next is computed.

    A line is handed to the operating system as soon as it is ready, so a killed process loses
    nothing. If a line cannot be written, the part of it that was written is removed. The previous
    content of the file stays until the first line is written. A file that is not a regular one (a
    pipe, ``/dev/null``) is only written to.

    Args:
        path: the file; ``-`` is stdout.
        mark: a key that each of its results has, and those of another kind have not.
        overwrite: whether it may exist already.
        resume: continue a file that was begun: see ``done``.

    Attributes:
        name: the user's name for the file.
        done: the index and sample of each result that the file holds already, and its prompt.

    Raises:
        UserError: it exists and is not empty, or it holds anything but results.
        OSError: it cannot be written.
    """

    def __init__(
        self, path: str, mark: str, *, overwrite: bool = False, resume: bool = False
    ) -> None:
        self.name = path
        self.done: dict[tuple[int, int], Any] = {}
        self._file: BinaryIO | None = None
        if path == "-":
            return
        self._path = Path(path)
        self._made = not self._path.exists()
        # not truncated: its content stays until there is a result
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._regular = self._path.is_file()
        if self._regular:
            _lock(self._file, path)
            size = self._path.stat().st_size
            if size and not overwrite and not resume:
                raise UserError(
                    f"--output {path}: exists already; --resume goes on with it, "
                    "--overwrite replaces it"
                )
            # where the next line goes
            self._end = self._read_done(mark) if resume else 0
            self._stale = size > self._end

    def _read_done(self, mark: str) -> int:
        """Note the results in the file; returns how many of its bytes are whole lines."""
        with naming(self._path):
            *lines, rest = self._path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                record = parse_json(line)
                index, sample, prompt = record["index"], record.get("sample", 0), record["prompt"]
                fine = type(index) is int and type(sample) is int and mark in record
            except (ValueError, KeyError, TypeError, AttributeError):
                fine = False
            if not fine:
                raise self._strange(number)
            self.done[index, sample] = prompt
        # a line that was cut off does not count; anything else would be lost
        if not rest.startswith(_BEGIN[: len(rest)]):
            raise self._strange(len(lines) + 1)
        return sum(len(line) + 1 for line in lines)

    def _strange(self, number: int) -> UserError:
        return UserError(f"--resume: line {number} of {self._path} is not a result of this command")

    def is_complete(self, jobs: Sequence[Job]) -> bool:
        """Whether the file holds every result already.

        Args:
            jobs: the jobs of this command.

        Raises:
            UserError: it holds results of other jobs.
        """
        asked = {job.index: job for job in jobs}
        for (index, sample), prompt in self.done.items():
            job = asked.get(index)
            if job is None or job.prompt != prompt or sample >= job.options.samples:
                raise UserError(
                    f"--resume: {self.name} has a result of another prompt: {prompt!r:.80}"
                )
        return len(self.done) == sum(job.options.samples for job in jobs)

    def write(self, record: dict[str, Any]) -> None:
        """One more line.

        Raises:
            OSError: it cannot be written; the lines before it are in the file.
        """
        if self._file is None:
            # JSON can escape a character that the terminal's encoding lacks
            ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
            print(_line(record, ascii_only).decode(), end="", flush=True)
            return
        with naming(self._path):
            self._append(_line(record), self._file.fileno())

    def _append(self, line: bytes, handle: int) -> None:
        if not self._regular:
            _write_all(handle, line)
            return
        if self._stale:
            os.ftruncate(handle, self._end)
            self._stale = False
        try:
            _write_all(handle, line)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(handle, self._end)
            raise
        self._end += len(line)
        self._made = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is None:
            return
        try:
            if self._regular and error[0] is None:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
            if self._made:
                # the file was made for results, and none came
                with suppress(OSError):
                    self._path.unlink()


def _line(record: dict[str, Any], ascii_only: bool = False) -> bytes:
    # a lone surrogate has no UTF-8 form, but JSON can escape it
    return (json.dumps(record, ensure_ascii=ascii_only) + "\n").encode(errors="backslashreplace")


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]


def _lock(file: BinaryIO, path: str) -> None:
    """Keep other processes of this command away."""
    try:
        lock_file(file.fileno())
    except BlockingIOError:
        raise UserError(f"--output {path}: another process is writing it") from None


class Display:
    """Texts one after another on stdout, each after its prompt; the first one as it is written.

    Pieces of a later text are held back until those before it have ended.

    Args:
        tasks: all tasks in the order in which they are shown, with the text of their prompts.
    """

    def __init__(self, tasks: Iterator[tuple[Task, str]]) -> None:
        self._tasks = tasks
        self._held: dict[Task, list[str]] = {}
        self._ended: set[Task] = set()
        self._current: Task | None = None
        self._shown = 0

    def show(self, event: Event) -> None:
        """Print what can be shown after one more event."""
        if self._current is None:
            self._begin()
        self._held.setdefault(event.task, []).append(event.text)
        if event.result is not None:
            self._ended.add(event.task)
        while self._current is not None and self._current in self._held:
            print("".join(self._held.pop(self._current)), end="", flush=True)
            if self._current not in self._ended:
                break
            self._ended.remove(self._current)
            print(flush=True)
            self._begin()

    def _begin(self) -> None:
        self._current, prompt = next(self._tasks, (None, ""))
        if self._current is not None:
            print(("---\n" if self._shown else "") + prompt, end="", flush=True)
            self._shown += 1


class Meter:
    """Counts tokens: a bar while they are written, the speed at the end, both on stderr.

    Only the time within its ``with`` blocks counts.

    Args:
        jobs: the jobs that are generated.
        bar: whether to show a bar; only on a terminal.
    """

    def __init__(self, jobs: Sequence[Job] = (), *, bar: bool = False) -> None:
        # a terminal that goes away must not end the work
        self._stream = SteadyStream(sys.stderr)
        self._first: float | None = None
        self._begin = self._seconds = 0.0
        self._tokens = self._ended = 0
        self._texts = sum(job.options.samples for job in jobs)
        self._bar = tqdm(
            total=sum(_expected(job.options) * job.options.samples for job in jobs),
            unit="token",
            leave=False,
            disable=not (bar and self._stream.isatty()),
            file=self._stream,
        )

    def __enter__(self) -> Self:
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._seconds += time.perf_counter() - self._begin
        self._bar.close()

    def count(self, event: Event) -> None:
        """Note what has come."""
        if event.result is not None:
            # the text has ended early: its remaining tokens are no longer expected
            expected = _expected(event.task.job.options)
            self._bar.total += event.task.counted - expected
            self._ended += 1
            self._bar.set_postfix_str(f"{self._ended} of {self._texts} texts", refresh=False)
        self.add(event.tokens)

    def add(self, tokens: int) -> None:
        """Count this many more tokens."""
        if tokens and self._first is None:
            self._first = time.perf_counter() - self._begin
        self._tokens += tokens
        self._bar.update(tokens)

    def say(self) -> None:
        """How fast it was, in one line."""
        if self._first is not None:
            speed = self._tokens / max(self._seconds, 1e-9)
            self._stream.write(
                f"{self._tokens} tokens in {self._seconds:.2f} s: {speed:.1f} tokens/s, "
                f"the first after {self._first:.2f} s\n"
            )
            self._stream.flush()


def _expected(options: Options) -> int:
    """Tokens of one text, including those of its other candidates."""
    return options.max_new_tokens * options.best_of
