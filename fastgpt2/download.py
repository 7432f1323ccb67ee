"""One file from the network: several mirrors, resume, checksum, and never half a file."""

import contextlib
import http.client
import os
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any, BinaryIO

from tqdm import tqdm

from fastgpt2 import streams
from fastgpt2.errors import UserError
from fastgpt2.files import sha256_of, sync, write_text

CHUNK = 1 << 16
# a server that sends less than this within one time limit is abandoned
MIN_BYTES_PER_SECOND = 1024


class DownloadError(UserError):
    """No mirror delivered the file; the message gives the reason of each."""


class _AttemptError(Exception):
    """One attempt failed; ``final`` if another attempt at the same mirror cannot help."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


def cache_dir() -> Path:
    """``$FASTGPT2_CACHE``, else ``$XDG_CACHE_HOME/fastgpt2``, else ``~/.cache/fastgpt2``.

    Without a home directory it is a folder of this user among the temporary files.
    """
    if chosen := os.environ.get("FASTGPT2_CACHE"):
        return Path(chosen)
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "fastgpt2"
    try:
        return Path.home() / ".cache" / "fastgpt2"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"fastgpt2-{os.getuid()}"


def download(
    urls: str | Sequence[str],
    path: str | Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    timeout: float = 30.0,
    retries: int = 2,
    progress: bool = True,
) -> Path:
    """Put the content of the first mirror that works at ``path``, and return ``path``.

    A file that is already there and passes the checks is kept. The bytes go to ``path`` + ``.part``
    under a lock, so that processes asking for the same file at once fetch it once, and are renamed
    when whole and checked. What an interrupted download left is continued: from any mirror when
    ``sha256`` can prove the result, else only where the server vouches, by its ETag, that the file
    is still the same.

    Args:
        urls: mirrors, the preferred first.
        sha256: expected hex digest of the content.
        size: expected number of bytes.
        timeout: seconds to wait for an answer, and over which a server must send at least
            ``MIN_BYTES_PER_SECOND``.
        retries: further attempts at each mirror after a failure that may pass.
        progress: show a bar on stderr.

    Raises:
        DownloadError: every mirror failed, with the reason of each, in one line.
    """
    path = Path(path)
    if _is_good(path, sha256, size):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".lock")):
            # another process may have fetched it while we waited for the lock
            if _is_good(path, sha256, size):
                return path
            file = _File(path, sha256, size, timeout, progress)
            reasons = []
            for url in [urls] if isinstance(urls, str) else urls:
                try:
                    file.fetch_from(url, retries)
                    return path
                except _AttemptError as error:
                    reasons.append(f"{url}: {error}")
    except OSError as error:
        # errors of the network have become reasons: this one comes from the disk
        raise DownloadError(f"cannot write {path}: {error.strerror}") from error
    raise DownloadError(f"cannot download {path.name}: {'; '.join(reasons)}")


def _is_good(path: Path, sha256: str | None, size: int | None) -> bool:
    if not path.is_file() or (size is not None and path.stat().st_size != size):
        return False
    return sha256 is None or sha256_of(path) == sha256


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class _File:
    """The file to fetch, and how."""

    path: Path
    sha256: str | None
    size: int | None
    timeout: float
    progress: bool

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    @property
    def etag(self) -> Path:
        return self.path.with_name(self.path.name + ".etag")

    @property
    def part_size(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def fetch_from(self, url: str, retries: int) -> None:
        """Try one mirror, several times where that can help."""
        for attempt in range(retries + 1):
            try:
                return self._attempt(url)
            except _AttemptError as error:
                if error.final or attempt == retries:
                    raise
            time.sleep(0.25 * 2**attempt)

    def _attempt(self, url: str) -> None:
        resumed = self.part_size > 0
        self._receive(url)
        try:
            self._check()
        except _AttemptError:
            if not resumed:
                raise
            # the first part came from another mirror, or is older: start again from zero
            self._receive(url)
            self._check()
        sync(self.part)
        os.replace(self.part, self.path)
        self.etag.unlink(missing_ok=True)

    def _check(self) -> None:
        """Remove a file that is not the expected one, and say expected and got."""
        problem = None
        if self.size is not None and self.part_size != self.size:
            problem = f"expected {self.size} bytes, got {self.part_size}"
        elif self.sha256 is not None and (got := sha256_of(self.part)) != self.sha256:
            problem = f"expected sha256 {self.sha256}, got {got}"
        if problem:
            self.part.unlink()
            self.etag.unlink(missing_ok=True)
            raise _AttemptError(problem, final=True)

    def _receive(self, url: str) -> None:
        """Append the missing part to the partial file."""
        start = self.part_size
        headers = {"User-Agent": "fastgpt2", "Accept-Encoding": "identity"}
        etag = self.etag.read_text(encoding="utf-8") if self.etag.is_file() else ""
        if start and (self.sha256 or etag):
            headers["Range"] = f"bytes={start}-"
            if not self.sha256:
                headers["If-Range"] = etag
        response = _open(url, headers, self.timeout)
        if response is None:
            # nothing follows the part that we have: it is whole, or a different file
            return
        with response:
            if response.status != 206:
                # the whole file is sent: the server does not resume, or the file has changed
                start = 0
                etag = response.headers.get("ETag", "")
                # a weak one does not promise the same bytes
                write_text(self.etag, "" if etag.startswith("W/") else etag)
            length = response.headers.get("Content-Length")
            total = None if length is None else start + int(length)
            with self.part.open("ab") as file:
                file.truncate(start)
                with tqdm(
                    desc=self.path.name,
                    total=total,
                    initial=start,
                    unit="B",
                    unit_scale=True,
                    disable=not self.progress,
                    delay=streams.BAR_DELAY,
                ) as bar:
                    _copy(response, file, bar, self.timeout)
        if total is not None and self.part_size != total:
            raise _AttemptError(f"the connection ended after {self.part_size} of {total} bytes")


def _open(url: str, headers: dict[str, str], timeout: float) -> Any:
    """The response, or None for status 416.

    In a thread, because Python's time limits do not cover the resolution of a name, which can take
    minutes on a machine with a bad connection.
    """
    answers: Queue[Any] = Queue()

    def ask() -> None:
        try:
            request = urllib.request.Request(url, headers=headers)
            answers.put(urllib.request.urlopen(request, timeout=timeout))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=timeout)
    except Empty:
        raise _explain(TimeoutError(), timeout) from None
    if isinstance(answer, urllib.error.HTTPError) and answer.code == 416:
        answer.close()
        return None
    if isinstance(answer, Exception):
        raise _explain(answer, timeout) from answer
    return answer


def _copy(response: Any, file: BinaryIO, bar: Any, timeout: float) -> None:
    window_start, window_bytes = time.monotonic(), 0
    while True:
        try:
            data = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _explain(error, timeout) from error
        if not data:
            return
        file.write(data)
        bar.update(len(data))
        window_bytes += len(data)
        elapsed = time.monotonic() - window_start
        if elapsed > timeout:
            if window_bytes < MIN_BYTES_PER_SECOND * elapsed:
                raise _AttemptError(f"too slow: {window_bytes} bytes in {elapsed:.0f} s")
            window_start, window_bytes = time.monotonic(), 0


def _explain(error: Exception, timeout: float) -> _AttemptError:
    """What went wrong in a few words, and whether trying again can help."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        return _AttemptError(f"HTTP {error.code} {error.reason}", final=error.code < 500)
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, socket.gaierror):
        return _AttemptError("the host name cannot be resolved", final=True)
    if isinstance(reason, TimeoutError):
        return _AttemptError(f"timed out after {timeout:g} s")
    if isinstance(reason, ValueError):
        return _AttemptError(str(reason), final=True)
    return _AttemptError(f"{reason or type(reason).__name__}")
