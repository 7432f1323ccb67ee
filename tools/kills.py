"""The part of ``tools.soak`` that counts kills: at random moments, wherever the training then is.

A start is a fork of this process, so it imports nothing: it prepares the data, unless that is done,
and begins or resumes the run. SIGKILL comes after a random time: to one rank, or to all as if the
machine lost its power. A run that reaches its end is compared with the unbroken one, and another
one begins, until there were enough kills.
"""

import mmap
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import numpy as np
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from fastgpt2 import prepare
from fastgpt2.train.__main__ import main as train_command
from tools.forked import fork_rank

# where a kill may find a run: the function that is then being called
PLACES = {
    "data preparation": "fastgpt2.prepare.main",
    "start": "fastgpt2.train.trainer.Trainer.__init__",
    "step": "fastgpt2.train.step.TrainingStep.__call__",
    "evaluation": "fastgpt2.train.trainer.validate",
    "copying": "fastgpt2.train.checkpoint.staged",
    "saving": "fastgpt2.train.checkpoint._write",
    "pruning": "fastgpt2.train.checkpoint.prune",
}
# seconds that the ranks that are left may take to end
GRACE = 600.0


class Places:
    """Which of ``PLACES`` each rank is in, in memory that it shares with the process that forks."""

    def __init__(self, ranks: int) -> None:
        self._memory = mmap.mmap(-1, ranks * len(PLACES))

    def watch(self, rank: int) -> None:
        """Note, to the end of this process, when it enters and leaves a place."""
        for number, target in enumerate(PLACES.values()):
            module, _, name = target.rpartition(".")
            owner: Any = resolve_name(module)
            place = rank * len(PLACES) + number
            patch.object(owner, name, self._noted(getattr(owner, name), place)).start()

    def _noted(self, function: Callable[..., Any], place: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._memory[place] = 1
            try:
                return function(*arguments, **options)
            finally:
                self._memory[place] = 0

        return call

    def found(self, rank: int) -> list[str]:
        """The names of the places that a rank is in, or was in when it died."""
        begin = rank * len(PLACES)
        return [name for name, is_in in zip(PLACES, self._memory[begin:], strict=False) if is_in]

    def clear(self) -> None:
        """No rank is anywhere."""
        self._memory[:] = bytes(len(self._memory))


class Job:
    """A run that is started again and again.

    Args:
        folder: gets the prepared data, the run, and what the ranks say.
        text: what it trains on.
        ranks: how many processes train.
        begin: the flags of a new run; has those of its folder and data added.
        next_flags: given the run's folder and the flags of a new run, the flags of the next start.
    """

    def __init__(
        self,
        folder: Path,
        text: Path,
        ranks: int,
        begin: list[str],
        next_flags: Callable[[Path, list[str]], list[str]],
    ) -> None:
        self.folder, self.run, self._tokens = folder, folder / "run", folder / "tokens"
        self._text, self._ranks, self._begin, self._next = text, ranks, begin, next_flags
        self._places = Places(ranks)
        folder.mkdir(parents=True)

    def _work(self, rank: int) -> int:
        self._places.watch(rank)
        patch("fastgpt2.train.trainer.plot", lambda *_: False).start()
        if self._ranks == 1 and not self._tokens.exists():
            text, out = str(self._text), str(self._tokens)
            # other processes would start for seconds, and most kills would come before they have
            flags = ["--tokenizer=bytes", "--workers=1"]
            code = prepare.main(["--data", text, "--out", out, *flags])
            if code:
                return code
        data = self._text if self._ranks > 1 else self._tokens
        flags = ["--data", str(data), "--out", str(self.run), *self._begin]
        return train_command(self._next(self.run, flags))

    def complaints(self) -> str:
        """What the ranks of the last start have said on stderr."""
        return "".join(x.read_text(encoding="utf-8") for x in sorted(self.folder.glob("err.*")))

    @contextmanager
    def started(self) -> Iterator[list[int]]:
        """The processes of one start; killed where the block leaves any."""
        self._places.clear()
        # a store of its own, as each torchrun has
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = store.port if self._ranks > 1 else None
        children: list[int] = []
        try:
            for rank in range(self._ranks):
                work = partial(self._work, rank)
                children.append(fork_rank(work, rank, self._ranks, port=port, said=self.folder))
            yield children
        finally:
            for child in children:
                _kill(child)

    def finish(self) -> float:
        """Start once more, and let it come to its end.

        Returns:
            Megabytes by which the memory of a rank has grown in the second half of the time, at
            most.
        """
        samples: list[list[float]] = []
        with self.started() as children:
            while not all(ended(child, 0.05) for child in children):
                samples.append([resident(child) for child in children])
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert not any(codes), self.complaints()
        half = len(samples) // 2
        if not half:
            return 0.0
        before, after = (np.max(part, axis=0) for part in (samples[:half], samples))
        return float(np.max(after - before))

    def kill(self, moments: random.Random, life: float) -> list[str] | None:
        """Start, and kill after a random time.

        Args:
            moments: gives the time, and who dies.
            life: seconds from the start to the kill, at most.

        Returns:
            The places that the victim was in, ``between`` where it was in none of ``PLACES``; None
            if the run had ended before.
        """
        with self.started() as children:
            victim = moments.choice(children)
            alone = self._ranks > 1 and moments.random() < 0.5
            if ended(victim, moments.uniform(0.0, life)):
                end = os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)
                assert end is not None and end.si_status == 0, self.complaints()
                return None
            os.kill(victim, signal.SIGKILL)
            ended(victim, GRACE)
            # the others find out, and end
            assert not alone or all(ended(child, GRACE) for child in children)
            return self._places.found(children.index(victim)) or ["between"]


def ended(child: int, seconds: float) -> bool:
    """Whether a process ends within a time; it can still be waited for then."""
    deadline = time.monotonic() + seconds
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def resident(process: int) -> float:
    """Megabytes of a process's resident memory; 0 of one that has ended."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _kill(child: int) -> None:
    # one that has been waited for is gone, and its number may be another process's
    with suppress(ChildProcessError):
        if not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def killed(
    job_in: Callable[[str], Job],
    kills: int,
    moments: random.Random,
    is_same: Callable[[Path, Path], bool],
    *,
    life: float | None,
) -> dict[str, Any]:
    """Kill a run ``kills`` times, and compare what it comes to with an unbroken one.

    Args:
        job_in: makes a job, given the name of its folder.
        kills: how many times; more runs than one where they end earlier.
        moments: the randomness of the kills.
        is_same: whether two runs have the same weights.
        life: seconds from a start to its kill, at most; None: as long as the unbroken run takes, so
            that the kills are spread over all of it on any machine.

    Returns:
        The numbers of kills, in all and by place, of runs, and of those that differ; and the
        growth of the memory of the unbroken run, in megabytes.
    """
    whole = job_in("whole")
    began = time.monotonic()
    grown = whole.finish()
    longest = time.monotonic() - began if life is None else life
    places: Counter[str] = Counter()
    count, finished, bad = 0, 0, 0
    while count < kills:
        job = job_in(f"killed_{finished}")
        while count < kills and (found := job.kill(moments, longest)) is not None:
            count += 1
            places.update(found)
        job.finish()
        bad += not is_same(job.run, whole.run)
        finished += 1
    return {
        "kills": count,
        "places": dict(places),
        "runs": finished,
        "different": bad,
        "megabytes": round(grown, 1),
    }
