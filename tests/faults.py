"""Faults to order: a disk that fails at its n-th write, a stream that breaks, a signal on cue.

Each is a context manager or an object with a count; run the same small program for every n until
the fault no longer happens (``fault.happened`` is False), and look at what is left.
"""

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch


@dataclass
class Fault:
    """Strikes when ``happen`` is called for the n-th time; ``lasts``: and each time after."""

    n: int
    lasts: bool = False
    calls: int = 0

    def strikes(self) -> bool:
        self.calls += 1
        return self.calls == self.n or (self.lasts and self.calls > self.n)

    @property
    def happened(self) -> bool:
        return self.calls >= self.n


@contextmanager
def failing_disk(
    n: int, folder: Path, *, lasts: bool = False, number: int = errno.ENOSPC
) -> Iterator[Fault]:
    """The n-th thing that is put on the disk under ``folder`` fails: the disk is full.

    Deletions work, as they do on a full disk. ``number`` is the error's: ``errno.EIO`` for a disk
    that breaks.
    """
    fault = Fault(n, lasts)

    def fail(path: Any) -> None:
        if fault.strikes():
            raise OSError(number, os.strerror(number), str(path))

    with watched_disk(folder, fail):
        yield fault


@contextmanager
def signalling_disk(n: int, folder: Path, number: int) -> Iterator[Fault]:
    """Send this process a signal before the n-th thing is put on the disk under ``folder``."""
    fault = Fault(n)

    def send(path: Any) -> None:
        if fault.strikes():
            os.kill(os.getpid(), number)

    with watched_disk(folder, send):
        yield fault


@contextmanager
def watched_disk(folder: Path, watch: Callable[[Any], None]) -> Iterator[None]:
    """Call ``watch`` with the path before anything is put on the disk under ``folder``.

    Files that are opened to be written, what is written into them (half of it arrives if ``watch``
    raises), folders made, links, renames and syncs count.
    """

    def is_watched(path: Any) -> bool:
        return str(path).startswith(str(folder))

    def check(path: Any) -> None:
        if is_watched(path):
            watch(path)

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            check(path)
            return function(path, *arguments, **options)

        return call

    def checked_open(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not set(mode) & set("wax+") or not is_watched(path):
                return function(path, mode, *arguments, **options)
            check(path)
            buffered = 0 not in (*arguments, *options.values())
            if "b" in mode and buffered:
                kind = io.BufferedRandom if "+" in mode else io.BufferedWriter
                return kind(FailingFile(path, mode, check))
            return function(path, mode, *arguments, **options)

        return call

    def fsync(handle: int) -> None:
        check(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    def write(handle: int, data: bytes) -> int:
        try:
            check(os.readlink(f"/proc/self/fd/{handle}"))
        except OSError:
            write_some(handle, data[: len(data) // 2])
            raise
        return write_some(handle, data)

    sync, write_some = os.fsync, os.write
    with ExitStack() as stack:
        for target, name, function in (
            (os, "fsync", fsync),
            (os, "write", write),
            *(
                (os, name, checked(getattr(os, name)))
                for name in ("mkdir", "link", "rename", "replace")
            ),
            (builtins, "open", checked_open(builtins.open)),
            (io, "open", checked_open(io.open)),
        ):
            stack.enter_context(patch.object(target, name, function))
        yield


class FailingFile(io.FileIO):
    """A file in which ``check``, called with its path before each write, may fail the write."""

    def __init__(self, path: Any, mode: str, check: Callable[[Any], None]) -> None:
        super().__init__(path, mode.replace("b", ""))
        self._check = check

    def write(self, data: Any) -> int:
        try:
            self._check(self.name)
        except OSError:
            super().write(memoryview(data)[: len(data) // 2])
            raise
        return super().write(data)


class BreakingStream(io.StringIO):
    """A terminal that goes away at the n-th write, or with ``errno.EPIPE`` the reader of a pipe."""

    def __init__(self, n: int, number: int = errno.EIO) -> None:
        super().__init__()
        self.fault, self.number = Fault(n, lasts=True), number

    def write(self, text: str) -> int:
        if self.fault.strikes():
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)

    def flush(self) -> None:
        if self.fault.happened:
            raise OSError(self.number, os.strerror(self.number))


@contextmanager
def signal_at(point: str, n: int, number: int) -> Iterator[Fault]:
    """Send this process a signal before the n-th call of ``point``, a dotted name."""
    fault = Fault(n)
    module, _, name = point.rpartition(".")
    owner: Any = resolve_name(module)
    function = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        if fault.strikes():
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    with patch.object(owner, name, call):
        yield fault


SIGNALS = [number for number in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, number)]


@contextmanager
def failing_reads(n: int, folder: Path, *, number: int = errno.EIO) -> Iterator[Fault]:
    """The n-th read of a file under ``folder``, and each later one, fails: a disk that breaks.

    Files that are opened to be read, what is read from them and folders that are listed count; what
    a library reads by itself, such as safetensors, does not.
    """
    fault = Fault(n, lasts=True)

    def check(path: Any, *, named: bool) -> None:
        if str(path).startswith(str(folder)) and fault.strikes():
            # only a call that is given a name says it in its error
            raise OSError(number, os.strerror(number), *([str(path)] if named else []))

    class Reader(io.FileIO):
        def readinto(self, buffer: Any) -> Any:
            check(self.name, named=False)
            return super().readinto(buffer)

        def readall(self) -> bytes:
            check(self.name, named=False)
            return super().readall()

        def read(self, size: int | None = -1) -> Any:
            check(self.name, named=False)
            return super().read(size)

    def checked_open(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if set(mode) & set("wax+") or not str(path).startswith(str(folder)):
                return function(path, mode, *arguments, **options)
            check(path, named=True)
            raw = Reader(path, "r")
            if "b" in mode:
                return raw if 0 in (*arguments, *options.values()) else io.BufferedReader(raw)
            names = ("encoding", "errors", "newline")
            text = {name: options[name] for name in names if name in options}
            return io.TextIOWrapper(io.BufferedReader(raw), **text)

        return call

    def pread(handle: int, *arguments: Any) -> bytes:
        check(os.readlink(f"/proc/self/fd/{handle}"), named=False)
        return read_at(handle, *arguments)

    def listed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *arguments: Any, **options: Any) -> Any:
            check(path, named=True)
            return function(path, *arguments, **options)

        return call

    read_at = os.pread
    with ExitStack() as stack:
        for target, name, function in (
            (os, "pread", pread),
            (os, "listdir", listed(os.listdir)),
            (os, "scandir", listed(os.scandir)),
            (builtins, "open", checked_open(builtins.open)),
            (io, "open", checked_open(io.open)),
        ):
            stack.enter_context(patch.object(target, name, function))
        yield fault
