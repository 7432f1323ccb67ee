"""Run by test_kill.py: train, and die without warning.

``python -m tests.train.killed DATA FOLDER`` makes one run for each kill point in the writing of a
checkpoint, ``FOLDER/<point>``, each in a process of its own that ends with SIGKILL, and one that
nobody kills, ``FOLDER/whole``.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fastgpt2 import runs
from fastgpt2.train import checkpoint
from fastgpt2.train.config import TrainConfig
from fastgpt2.weights.safetensors_file import write_safetensors
from tests.train.tiny_run import tiny_train_config, train
from tools.forked import fork_rank

# which checkpoint dies, the one of the second evaluation
STEP = 4


def kill_config(data: Path) -> TrainConfig:
    return tiny_train_config(data, steps=6, eval_every=2, keep_last=1)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(path: Any) -> bool:
    return f"step_{STEP:08d}" in str(path)


def while_writing(file: str) -> Callable[[], None]:
    """Half of a safetensors file reaches the disk."""

    def arm() -> None:
        def write_half(path: Path, *arguments: Any, **options: Any) -> None:
            write_safetensors(path, *arguments, **options)
            if path.name == file and at_step(path):
                os.truncate(path, path.stat().st_size // 2)
                die()

        patch.object(checkpoint, "write_safetensors", write_half).start()

    return arm


def around_rename(before: bool) -> Callable[[], None]:
    def arm() -> None:
        whole = os.rename

        def rename(source: Any, target: Any) -> None:
            if before and at_step(target):
                die()
            whole(source, target)
            if at_step(target):
                die()

        patch("os.rename", rename).start()

    return arm


def as_it_begins() -> None:
    """The configuration is written, but has not got its name."""
    whole = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == runs.RUN_CONFIG:
            die()
        whole(source, target)

    patch("os.replace", replace).start()


def while_pruning() -> None:
    """The old checkpoint is half gone."""
    whole = shutil.rmtree

    def rmtree(folder: Any, **options: Any) -> None:
        if "step_00000002" in str(folder) and Path(folder).exists():
            (Path(folder) / runs.MODEL).unlink()
            die()
        whole(folder, **options)

    patch("shutil.rmtree", rmtree).start()


POINTS: dict[str, Callable[[], None]] = {
    "model": while_writing(runs.MODEL),
    "optimizer": while_writing(runs.OPTIMIZER),
    "before_rename": around_rename(before=True),
    "after_rename": around_rename(before=False),
    "pruning": while_pruning,
    "beginning": as_it_begins,
    "whole": lambda: None,
}


def main(data: Path, folder: Path) -> None:
    for name, arm in POINTS.items():

        def body(name: str = name, arm: Callable[[], None] = arm) -> int:
            arm()
            patch("fastgpt2.train.trainer.plot").start()
            train(kill_config(data), folder / name)
            return 0

        # nothing has been computed yet, so no thread is lost in the fork
        _, status = os.waitpid(fork_rank(body, 0, 1, port=None, said=folder), 0)
        expected = 0 if name == "whole" else signal.SIGKILL
        code, said = os.waitstatus_to_exitcode(status), (folder / "err.0").read_text("utf-8")
        assert code == -expected, f"{name}: {said}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
