"""Processes of one job fail together: the first error is said once, and no process waits forever.

They meet in the key-value store that torchrun keeps for them. A process that fails leaves its exit
code there; a thread of every other process looks for it, since a collective operation with a
process that has ended may never return. The same thread watches whether its own process moves on.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fastgpt2 import distributed
from fastgpt2.cli import exit_code
from fastgpt2.errors import EndedElsewhere, UserError

# names of the threads that read batches ahead and write checkpoints
READER, SAVER = "reader", "saver"
# exit code of a job that hangs: EX_TEMPFAIL of sysexits.h, "try again"
STUCK = 75
# seconds between two looks, and from an error elsewhere to the end of a process that still waits
_INTERVAL, _GRACE = 0.25, 3.0
# seconds between two looks after which the whole process must have been stopped
_STOPPED = 5.0
# messages of gloo, NCCL and the store about a process that has ended
_LOST = ("closed by peer", "reset by peer", "Connection refused", "Broken pipe", "timed out")


def remember(name: str, value: str) -> None:
    """Keep ``value`` for the processes that torchrun starts in place of those of now.

    Args:
        name: what ``recall`` asks for.
        value: kept as long as torchrun itself runs; without torchrun, nothing is.
    """
    if distributed.is_elastic():
        distributed.job_store().set(f"fastgpt2/{name}", value)


def recall(name: str) -> str | None:
    """What an earlier start of this job has kept under ``name``, or None.

    Args:
        name: as ``remember`` was given it.
    """
    if not distributed.is_elastic():
        return None
    store, key = distributed.job_store(), f"fastgpt2/{name}"
    return store.get(key).decode("utf-8") if store.check([key]) else None


@contextmanager
def failing_together() -> Iterator["Watch"]:
    """Within the block, an error of any process ends all; only the first to fail raises its own.

    All processes enter it, with a process group if they are several. An error is not held up: the
    process that raises it goes on to say it, the others raise ``EndedElsewhere``, or are ended
    where they wait. Once the watch that it gives has a timeout, a process that does not move on
    ends the job, and its stack is shown.

    Raises:
        EndedElsewhere: another process has failed before.
        UserError: another process has ended without a word.
    """
    watch = Watch()
    try:
        yield watch
    except Exception as error:
        if isinstance(error, EndedElsewhere):
            # all processes know already
            raise
        lost = any(part in str(error) for part in _LOST) and not isinstance(error, UserError)
        ended = watch.failed(2 if lost else exit_code(error), wait=lost)
        if ended is not None:
            raise EndedElsewhere(ended) from None
        if lost:
            raise UserError("another process of the job has ended without a word") from None
        raise
    finally:
        watch.stop()


class Watch:
    """The exit code of the first process to fail, and the thread that looks for it.

    Attributes:
        timeout: seconds from one agreement of the processes to the next, at most; 0 waits forever.
    """

    timeout = 0.0

    def __init__(self) -> None:
        self._key = f"fastgpt2/{distributed.attempt()}"
        self._store = None if distributed.world_size() == 1 else distributed.job_store()
        self._lost = False
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._look, name="peers", daemon=True)
        self._thread.start()

    def failed(self, code: int, *, wait: bool) -> int | None:
        """Leave the exit code of this process; returns that of a process that failed before.

        Args:
            code: of this process.
            wait: the error looks like the end of another process, which may be about to say why.
        """
        deadline = time.monotonic() + (_GRACE / 2 if wait else 0.0)
        while (found := self._found()) is None and not self._lost and time.monotonic() < deadline:
            time.sleep(0.05)
        if found is not None or self._store is None:
            return found
        if not self._lost:
            with self._asking():
                if self._store.add(f"{self._key}/failures", 1) == 1:
                    self._store.set(f"{self._key}/failed", str(code))
                    return None
        # if the store is there, another one was faster. Without torchrun, the first process keeps
        # the store and has said why it ended. A store of torchrun goes with its whole machine:
        # one process of each other machine says that
        speaks = self._lost and distributed.is_elastic() and distributed.local_rank() == 0
        return None if speaks else self._found() or code

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Within the block, the store may be asked, or turn out to have gone away."""
        try:
            with self._lock:
                yield
        except RuntimeError:
            # is not asked again: each time PyTorch shows a screenful of C++
            self._lost = True

    def _found(self) -> int | None:
        if self._store is None or self._lost:
            return None
        with self._asking():
            if self._store.check([f"{self._key}/failed"]):
                return int(self._store.get(f"{self._key}/failed"))
        return None

    def _look(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(_INTERVAL):
            now = time.monotonic()
            if now - last > _STOPPED:
                # Ctrl-Z or a debugger has stopped this thread and the others: nothing hangs
                distributed.leave_out(now - last)
            last = now
            code = self._found()
            if code is not None:
                # the main thread may be on its way out
                if not self._stopped.wait(_GRACE):
                    _end(code)
                return
            if self.timeout and distributed.seconds_since_agreement() > self.timeout:
                self._report()

    def _report(self) -> None:
        """Show the stack of each process that lags the others, and end the job."""
        frame = sys._current_frames().get(self._main)
        stack = "" if frame is None else "".join(traceback.format_stack(frame))
        stack += _thread_stacks()
        mine = f"{distributed.agreements()}\n{stack}"
        reports: dict[int, str] = {distributed.rank(): mine}
        if self._store is not None:
            with self._asking():
                self._store.set(f"{self._key}/stuck/{distributed.rank()}", mine)
                if self._store.add(f"{self._key}/reports", 1) > 1:
                    # another process reports; it ends this one
                    return
            # the others find out at nearly the same time
            time.sleep(4 * _INTERVAL)
            reports |= self._reports()
        counts = {rank: int(report.partition("\n")[0]) for rank, report in reports.items()}
        for rank in range(distributed.world_size()):
            if rank not in reports:
                _say(f"rank {rank} does not answer")
            elif counts[rank] == min(counts.values()):
                _say(f"rank {rank} has not moved on for {self.timeout:g} s; it is here:")
                sys.stderr.write(reports[rank].partition("\n")[2])
        self.failed(STUCK, wait=False)
        _end(STUCK)

    def _reports(self) -> dict[int, str]:
        assert self._store is not None
        found = {}
        with self._asking():
            for rank in range(distributed.world_size()):
                key = f"{self._key}/stuck/{rank}"
                if self._store.check([key]):
                    found[rank] = self._store.get(key).decode("utf-8")
        return found


def _thread_stacks() -> str:
    """Where the threads are that the main thread may wait for."""
    frames = sys._current_frames()
    return "".join(
        f"its {thread.name} is here:\n{''.join(traceback.format_stack(frames[thread.ident]))}"
        for thread in threading.enumerate()
        if thread.name in (READER, SAVER) and thread.ident in frames
    )


def _say(line: str) -> None:
    sys.stderr.write(f"fastgpt2: error: {line}\n")


def _end(code: int) -> None:
    """End the process at once: its main thread waits for something that may never come."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
