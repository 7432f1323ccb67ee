"""The part of ``tools.soak`` that counts kills: at random moments, wherever the training then is.

A start is a fork of this process, so it imports nothing: it prepares the data, unless that is done,
and begins or resumes the run. SIGKILL comes to one rank, or to all as if the machine lost its
power. Every second kill comes after a random time; the others wait until a rank is in a certain
place, since some, like the pruning, take too little time to be met by chance. A run that reaches
its end is compared with the unbroken one, and another one begins, until there were enough kills.
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
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from fastgpt2 import prepare
from fastgpt2.train.__main__ import main as train_command
from tools.forked import fork_rank

# where a kill may find a run: the function that is then being called
PLACES = {
    "data preparation": "fastgpt2.prepare.main",
    # several ranks make tokens of the text here
    "reading": "fastgpt2.train.trainer.build_dataset",
    "start": "fastgpt2.train.trainer.Trainer.__init__",
    "step": "fastgpt2.train.step.TrainingStep.__call__",
    "evaluation": "fastgpt2.train.trainer.validate",
    "copying": "fastgpt2.train.checkpoint.staged",
    "saving": "fastgpt2.train.checkpoint._write",
    "pruning": "fastgpt2.train.checkpoint.prune",
}
# seconds that the ranks that are left may take to end
GRACE = 600.0


class Aim(NamedTuple):
    """Where a kill is to find a rank.

    Attributes:
        place: one of ``PLACES``.
        visit: the rank has entered it so often.
        delay: seconds from then on.
    """

    place: str
    visit: int
    delay: float


class Places:
    """Which of ``PLACES`` each rank is in, in memory that it shares with the process that forks."""

    def __init__(self, ranks: int) -> None:
        # for each place: whether the rank is in it, how often it has entered, seconds in all
        memory = mmap.mmap(-1, ranks * len(PLACES) * 3 * np.float64().itemsize)
        self._seen = np.frombuffer(memory).reshape(ranks, len(PLACES), 3)

    def watch(self, rank: int) -> None:
        """Note, to the end of this process, when it enters and leaves a place."""
        for row, target in zip(self._seen[rank], PLACES.values(), strict=True):
            module, _, name = target.rpartition(".")
            owner: Any = resolve_name(module)
            patch.object(owner, name, _noted(getattr(owner, name), row)).start()

    def found(self, rank: int) -> list[str]:
        """The names of the places that a rank is in, or was in when it died."""
        return [name for name, row in zip(PLACES, self._seen[rank], strict=True) if row[0]]

    def visits(self, rank: int, place: str) -> int:
        """How often a rank has entered a place."""
        return int(self._seen[rank, list(PLACES).index(place), 1])

    def met(self, aim: Aim) -> int | None:
        """The rank that is where it is aimed at; None where none is."""
        for rank in range(len(self._seen)):
            if aim.place in self.found(rank) and self.visits(rank, aim.place) >= aim.visit:
                return rank
        return None

    def usual(self) -> dict[str, tuple[int, float]]:
        """Of the places that were entered: how often by a rank, at most, and seconds for each."""
        entered, seconds = self._seen[:, :, 1], self._seen[:, :, 2]
        means = seconds.sum(0) / np.maximum(entered.sum(0), 1)
        most = zip(PLACES, entered.max(0), means, strict=True)
        return {name: (int(count), float(mean)) for name, count, mean in most if count}

    def clear(self) -> None:
        """No rank is or was anywhere."""
        self._seen[:] = 0.0


def _noted(function: Callable[..., Any], row: Any) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        began = time.monotonic()
        row[1] += 1
        row[0] = 1
        try:
            return function(*arguments, **options)
        finally:
            row[0] = 0
            row[2] += time.monotonic() - began

    return call


class Job:
    """A run that is started again and again.

    Args:
        folder: gets the prepared data, the run, and what the ranks say.
        text: what it trains on.
        ranks: how many processes train.
        begin: the flags of a new run; has those of its folder and data added.
        next_flags: given the run's folder and the flags of a new run, the flags of the next start.

    Attributes:
        places: where the ranks of the last start are, or were.
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
        self.places = Places(ranks)
        folder.mkdir(parents=True)

    def _work(self, rank: int) -> int:
        self.places.watch(rank)
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
        self.places.clear()
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
            Megabytes by which the memory of a rank has grown in the second half of its steps, at
            most.
        """
        samples: list[list[tuple[int, float]]] = [[] for _ in range(self._ranks)]
        with self.started() as children:
            while not all(ended(child, 0.05) for child in children):
                for rank, child in enumerate(children):
                    samples[rank].append((self.places.visits(rank, "step"), resident(child)))
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert not any(codes), self.complaints()
        return max(growth(places) for places in samples)

    def kill(self, moments: random.Random, life: float, aim: Aim | None) -> list[str] | None:
        """Start, and kill.

        Args:
            moments: gives the time, and who dies.
            life: seconds from the start to the kill, at most.
            aim: where the victim is to be, at any time; None: anywhere, at a random time.

        Returns:
            The places that the victim was in, ``between`` where it was in none of ``PLACES``; None
            if the run had ended before.
        """
        with self.started() as children:
            alone = self._ranks > 1 and moments.random() < 0.5
            if aim is not None:
                victim = self._met(aim, children)
            else:
                victim = moments.choice(children)
                ended(victim, moments.uniform(0.0, life))
            os.kill(victim, signal.SIGKILL)
            end = os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)
            if end is not None and end.si_code == os.CLD_EXITED:
                assert end.si_status == 0, self.complaints()
                return None
            # the others find out, and end
            assert not alone or all(ended(child, GRACE) for child in children)
            return self.places.found(children.index(victim)) or ["between"]

    def _met(self, aim: Aim, children: list[int]) -> int:
        """The rank that is where it is aimed at; the first one that ends where none comes there."""
        while (rank := self.places.met(aim)) is None:
            for child in children:
                if ended(child, 0.0):
                    return child
            time.sleep(0.0005)
        time.sleep(aim.delay)
        return children[rank]


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


def growth(samples: list[tuple[int, float]]) -> float:
    """Megabytes by which the most of the second half of the steps exceeds the most of the first.

    Halves of the time would differ on a busy machine: the first one might end before a step.

    Args:
        samples: steps so far, and megabytes, of one process.
    """
    half = samples[-1][0] / 2 if samples else 0.0
    before = [megabytes for steps, megabytes in samples if steps <= half]
    return max(megabytes for _, megabytes in samples) - max(before) if before else 0.0


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
        The numbers of kills, in all and by place, of visits of the unbroken run to each place, of
        runs, and of those that differ; and the growth of the memory of the unbroken run, in
        megabytes.
    """
    whole = job_in("whole")
    began = time.monotonic()
    grown = whole.finish()
    longest = time.monotonic() - began if life is None else life
    usual = whole.places.usual()
    places: Counter[str] = Counter()
    count, finished, bad = 0, 0, 0

    def next_aim() -> Aim | None:
        if count % 2 == 0:
            return None
        place = list(usual)[count // 2 % len(usual)]
        visits, seconds = usual[place]
        # a run that is resumed late comes there less often
        visit = moments.randint(1, max(1, visits // 2))
        # a later half may be over before the kill
        return Aim(place, visit, moments.uniform(0.0, seconds / 2))

    while count < kills:
        job = job_in(f"killed_{finished}")
        while count < kills and (found := job.kill(moments, longest, next_aim())) is not None:
            count += 1
            places.update(found)
        job.finish()
        bad += not is_same(job.run, whole.run)
        finished += 1
    return {
        "kills": count,
        "places": {name: places[name] for name in (*usual, "between")},
        "visits": {name: visits for name, (visits, _) in usual.items()},
        "runs": finished,
        "different": bad,
        "megabytes": round(grown, 1),
    }
