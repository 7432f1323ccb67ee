"""Run by test_ranks.py: training by several processes, many scenarios in one start of PyTorch.

``main`` forks the ranks of each scenario, as torchrun would start them, and writes
``FOLDER/NAME/outcome.json``: exit codes and what each rank has said.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from fastgpt2.train.__main__ import main as train_command
from fastgpt2.train.step import TrainingStep
from tools.forked import fork_rank

SHAPE = "--tokenizer=bytes --model=gpt2-nano --block-size=16 --n-layer=2 --n-head=2 --n-embd=16"
LENGTH = "--steps=4 --warmup-steps=1 --log-every=1 --eval-every=2 --sample-tokens=3"
SCHEDULE = "--optimizer=adamw --lr=1e-2 --schedule=constant"
MACHINE = f"--device={os.environ.get('RANKS_DEVICE', 'cpu')} --dtype=fp32 --keep-last=9"
COMMON = [*SHAPE.split(), *LENGTH.split(), *SCHEDULE.split(), *MACHINE.split()]

# seconds from the failure of one rank to the end of the others; torchrun has 30
PATIENCE = 8.0
# how often the ranks of a scenario are started again
RESTARTS = {"elastic": 1}
# no other scenario needs their runs, and they mostly wait: they run beside the others
ASIDE = ("hangs", "reader hangs", "saver hangs")

Fault = Callable[[int], None]


def in_ranks(count: int, body: Callable[[int], int], folder: Path) -> dict[str, Any]:
    """Fork ``count`` ranks, once more where they fail with ``RESTARTS`` left, as torchrun does."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    restarts = RESTARTS.get(folder.name, 0)
    for attempt in range(restarts + 1):
        outcome = attempted(count, body, folder, store.port, attempt)
        if not any(outcome["codes"]):
            break
    return outcome


def attempted(
    count: int, body: Callable[[int], int], folder: Path, port: int, attempt: int
) -> dict[str, Any]:
    """Exit codes of ``count`` ranks, and what each has said."""
    folder.mkdir(parents=True, exist_ok=True)
    children = [
        fork_rank(partial(body, rank), rank, count, port=port, said=folder, attempt=attempt)
        for rank in range(count)
    ]
    codes = ended(children)
    said = {
        name: [(folder / f"{name}.{rank}").read_text(encoding="utf-8") for rank in range(count)]
        for name in ("out", "err")
    }
    return {"codes": codes, **said}


def ended(children: list[int]) -> list[int]:
    """Exit codes of all; as torchrun does, kill those that outlive a failure of another one."""
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:
                    deadline = min(deadline, time.monotonic() + PATIENCE)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]


def command(arguments: Sequence[str], fault: Fault | None = None) -> Callable[[int], int]:
    """``fastgpt2 train`` in each rank, after ``fault`` has been prepared."""

    def body(rank: int) -> int:
        patch("fastgpt2.train.trainer.plot", lambda *_: False).start()
        if fault is not None:
            fault(rank)
        return train_command(list(arguments))

    return body


def at_step(number: int, on_rank: int, action: Callable[[], None]) -> Fault:
    """On one rank, ``action`` happens at the beginning of its step ``number``, from 1."""

    def prepare(rank: int) -> None:
        whole, calls = TrainingStep.__call__, 0

        def call(self: TrainingStep, *arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                action()
            return whole(self, *arguments)

        if rank == on_rank:
            patch.object(TrainingStep, "__call__", call).start()

    return prepare


def main(scenarios: dict[str, tuple[int, Callable[[int], int]]], folder: Path) -> None:
    def run(name: str) -> int:
        count, body = scenarios[name]
        outcome = in_ranks(count, body, folder / name)
        (folder / name / "outcome.json").write_text(json.dumps(outcome), encoding="utf-8")
        return 0

    aside = []
    for name in set(ASIDE) & set(scenarios):
        (said := folder / f"aside {name}").mkdir()
        aside.append(fork_rank(partial(run, name), 0, 1, port=None, said=said))
    for name in scenarios:
        if name not in ASIDE:
            run(name)
    for child in aside:
        _, status = os.waitpid(child, 0)
        assert status == 0, f"{sorted(folder.glob('aside */err.0'))} say why"
