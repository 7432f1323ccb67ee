"""The scenarios of test_ranks.py, by name: how many ranks, and what each does."""

import errno
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from fastgpt2 import runs
from fastgpt2.errors import UserError
from fastgpt2.files import atomic_path
from fastgpt2.model import GPT
from fastgpt2.text import BlockStream, Dataset, build_dataset
from fastgpt2.train.forward import forward_pass
from fastgpt2.train.step import StepResult, TrainingStep
from tests.faults import failing_disk
from tests.train.ranks import COMMON, Fault, at_step, command, main
from tests.train.step_memory import compared_in_ranks

TWO_BY_TWO = ("--batch-size=2", "--grad-accum=2")
DROPOUT = "--dropout=0.1"
# losses that hardly change
STEADY = (
    "--optimizer=muon",
    "--batch-size=2",
    "--steps=36",
    "--eval-every=30",
    "--lr=1e-4",
    "--sample-tokens=0",
)
MUON = ("--optimizer=muon", "--lr=1e-3", "--muon-warmup-steps=2")


def fail() -> None:
    raise UserError("a mistake on this rank")


def crash() -> None:
    raise ZeroDivisionError("a fault of ours")


def hang() -> None:
    time.sleep(600)


def reader_hangs(rank: int) -> None:
    """On one rank, the data of the second step never comes."""
    whole, calls = BlockStream.batch_at, 0

    def batch_at(self: BlockStream, place: int) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 3:
            hang()
        return whole(self, place)

    if rank == 1:
        patch.object(BlockStream, "batch_at", batch_at).start()


def saver_hangs(rank: int) -> None:
    """The disk of one rank never takes its part of a checkpoint."""
    if rank == 1:
        patch.object(HuggingFaceStorageWriter, "write_data", lambda *_: hang()).start()


def interrupted_in_its_save(rank: int) -> None:
    """One rank is stopped in its third step; the write of its part brings another signal."""
    whole, calls = HuggingFaceStorageWriter.write_data, 0

    def write(self: HuggingFaceStorageWriter, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            sending(signal.SIGINT)()
            hang()
        return whole(self, *arguments)

    if rank == 1:
        patch.object(HuggingFaceStorageWriter, "write_data", write).start()
    at_step(4, 1, sending(signal.SIGTERM))(rank)


def unreadable_validation(rank: int) -> None:
    """One rank cannot read the validation split."""

    class Batches:
        """As the data, read when the first batch is asked for."""

        def __next__(self) -> Any:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "val.tokens")

    if rank == 1:
        patch("fastgpt2.train.validation.iter_eval_batches", lambda *_, **__: Batches()).start()


def memory_of_steps(rank: int) -> int:
    """Says what two processes need for a step, and what is expected."""
    print(json.dumps(compared_in_ranks()))
    return 0


def killed_after(checkpoint: Path) -> Callable[[], None]:
    """Die as soon as a checkpoint is there, which a busy machine writes late."""

    def die() -> None:
        while not checkpoint.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    return die


def in_first_attempt(fault: Fault) -> Fault:
    def prepare(rank: int) -> None:
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            fault(rank)

    return prepare


def sending(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def disk_fails(run: Path, step: int, on_rank: int, number: int) -> Fault:
    """From the first write on, one rank alone can put nothing of a checkpoint on the disk."""
    faults = ExitStack()

    def prepare(rank: int) -> None:
        if rank == on_rank:
            folder = run / "checkpoints" / f".step_{step:08d}"
            # to the end of the process
            faults.enter_context(failing_disk(1, folder, lasts=True, number=number))

    return prepare


def compile_in_python(rank: int) -> None:
    """``torch.compile`` with all but its last part, which would call a C++ compiler."""
    patch("torch.compile", partial(torch.compile, backend="aot_eager")).start()
    patch("fastgpt2.train.compiled.compiler_obstacle", lambda device: None).start()


def other_data(path: Path) -> Fault:
    """On the machine of one rank, the file has another content."""

    def prepare(rank: int) -> None:
        def build(data: tuple[str, ...], *arguments: Any, **options: Any) -> Dataset:
            return build_dataset((str(path),), *arguments, **options)

        if rank == 1:
            path.write_text("the cats sat there\n" * 99, encoding="utf-8")
            patch("fastgpt2.train.trainer.build_dataset", build).start()

    return prepare


def elsewhere(folder: Path) -> Fault:
    """Each rank has a disk of its own."""

    def prepare(rank: int) -> None:
        place = folder / f"disk {rank}"
        place.mkdir(parents=True)
        os.chdir(place)
        patch("fastgpt2.train.claim._PATIENCE", 0.2).start()

    return prepare


def infinite_mlp(rank: int) -> None:
    """On one rank, the first block's MLP computes no finite number."""

    def prepared(forward: Any, model: GPT, *arguments: Any, **options: Any) -> Any:
        mlp = model.get_submodule("transformer.h.0.mlp")
        mlp.register_forward_hook(lambda module, inputs, out: out * math.inf)
        return forward_pass(forward, model, *arguments, **options)

    if rank == 1:
        patch("fastgpt2.train.trainer.forward_pass", prepared).start()


def spiking(rank: int) -> None:
    """The loss of the 33rd step is ten times as large, on all ranks."""
    whole, calls = TrainingStep.__call__, 0

    def call(self: TrainingStep, *arguments: Any) -> StepResult:
        nonlocal calls
        calls += 1
        result = whole(self, *arguments)
        return result._replace(loss=result.loss * 10) if calls == 33 else result

    patch.object(TrainingStep, "__call__", call).start()


def usr1_early_and_late(rank: int) -> None:
    """SIGUSR1 to one rank: while it reads the data, and in its first step."""

    def build(*arguments: Any, **options: Any) -> Dataset:
        sending(signal.SIGUSR1)()
        return build_dataset(*arguments, **options)

    if rank == 1:
        patch("fastgpt2.train.trainer.build_dataset", build).start()
    at_step(1, 1, sending(signal.SIGUSR1))(rank)


def machine_dies(folder: Path) -> Fault:
    """The machine of one rank, on which torchrun keeps the store, dies in its second step."""
    address = folder / "port"

    def keep(parent: int) -> None:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with atomic_path(address) as temporary:
            temporary.write_text(str(store.port), encoding="ascii")
        # until rank 1 kills this process, or has ended
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(0)

    def prepare(rank: int) -> None:
        mine = os.getpid()
        keeper = os.fork() if rank == 1 else None
        if keeper == 0:
            keep(mine)
        while not address.exists():
            time.sleep(0.01)
        os.environ["MASTER_PORT"] = address.read_text(encoding="ascii")
        if keeper is not None:

            def die() -> None:
                for process in (keeper, mine):
                    os.kill(process, signal.SIGKILL)

            at_step(2, 1, die)(rank)

    return prepare


def documents(path: Path) -> Path:
    """Short documents, several to a block."""
    lines = [json.dumps({"text": "dog" * (i % 5 + 1)}) for i in range(300)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def many_characters(path: Path) -> Path:
    """A text of 4,200 characters: a vocabulary that is padded to 4,224 rows."""
    path.write_text("".join(f"{chr(0x4E00 + i)}\n" for i in range(4200)), encoding="utf-8")
    return path


def scenarios(data: Path, folder: Path) -> dict[str, tuple[int, Callable[[int], int]]]:
    def begin(name: str, *more: str) -> list[str]:
        return ["--data", str(data), "--out", str(folder / name / "run"), *COMMON, *more]

    def resume(name: str, *more: str) -> Callable[[int], int]:
        return command(["--resume", "--out", str(folder / name / "run"), *more])

    def mixture(name: str) -> list[str]:
        _, _, *rest = begin(name, "--eval-every=1", "--pack", "--optimizer=muon")
        return ["--data", f"{data}:0.3", f"{documents(folder / 'documents.jsonl')}:0.7", *rest]

    stop = at_step(3, 1, sending(signal.SIGTERM))
    table: dict[str, tuple[int, Callable[[int], int]]] = {}
    # by one process, replicated, sharded; with AdamW and with Muon
    for name, flags in (("muon", MUON), ("adamw", ())):
        table[f"{name} alone"] = (
            1,
            command(begin(f"{name} alone", "--batch-size=2", "--grad-accum=4", *flags)),
        )
        for kind in ("--no-shard", "--shard"):
            whole, parts = f"{name} {kind}", f"{name} {kind} parts"
            table[whole] = (2, command(begin(whole, *TWO_BY_TWO, *flags, kind)))
            # with dropout: stopped by a signal that one rank alone gets, and resumed
            unbroken = f"{whole} dropout"
            table[unbroken] = (2, command(begin(unbroken, *TWO_BY_TWO, *flags, kind, DROPOUT)))
            table[parts] = (2, command(begin(parts, *TWO_BY_TWO, *flags, kind, DROPOUT), stop))
            table[f"{parts}, resumed"] = (2, resume(parts))
    table |= {
        # the step of "adamw alone" and "adamw --no-shard", split between four
        "4x1": (4, command(begin("4x1", "--batch-size=2"))),
        "4x1 --shard": (4, command(begin("4x1 --shard", "--batch-size=2", "--shard"))),
        # begun by two ranks, resumed by one, and by three with steps of another size; ended by four
        "changed": (2, command([*mixture("changed"), *TWO_BY_TWO, "--shard", "--steps=1"])),
        "changed, one": (1, resume("changed", "--steps=2")),
        "changed, three": (
            3,
            resume("changed", "--steps=3", "--batch-size=1", "--grad-accum=3", "--no-shard"),
        ),
        "changed, four": (
            4,
            resume("changed", "--steps=4", "--batch-size=1", "--grad-accum=2", "--shard"),
        ),
        "steady": (1, command([*mixture("steady"), "--batch-size=8", "--steps=2"])),
        "steady, more": (1, resume("steady", "--steps=3", "--batch-size=9", "--grad-accum=1")),
        "steady, last": (1, resume("steady", "--steps=4", "--batch-size=8")),
        "usr1": (2, command(begin("usr1", *TWO_BY_TWO, "--shard"), usr1_early_and_late)),
        "minutes": (
            2,
            command(begin("minutes", *TWO_BY_TWO, "--shard", "--minutes=0.01", "--steps=9999")),
        ),
        "minutes, more": (2, resume("minutes", "--minutes=0.02")),
        "second signal": (
            2,
            command(begin("second signal", *TWO_BY_TWO, "--shard"), interrupted_in_its_save),
        ),
        "second signal, resumed": (2, resume("second signal")),
        "machine": (2, command(begin("machine"), machine_dies(folder / "machine"))),
        "other data": (2, command(begin("other data"), other_data(folder / "other.txt"))),
        "own disks": (
            2,
            command(
                ["--data", str(data), "--out", "run", *COMMON], elsewhere(folder / "own disks")
            ),
        ),
        "mistake": (2, command(begin("mistake"), at_step(2, 1, fail))),
        "fault": (2, command(begin("fault"), at_step(2, 0, crash))),
        "killed": (2, command(begin("killed"), at_step(2, 1, sending(signal.SIGKILL)))),
        "taken": (2, command(begin("adamw --no-shard"))),
        "hangs": (2, command(begin("hangs", "--timeout=5"), at_step(2, 1, hang))),
        "reader hangs": (
            2,
            command(begin("reader hangs", *TWO_BY_TWO, "--timeout=5"), reader_hangs),
        ),
        "saver hangs": (
            2,
            command(begin("saver hangs", *TWO_BY_TWO, "--shard", "--timeout=10"), saver_hangs),
        ),
        "unreadable": (
            2,
            command(begin("unreadable", *TWO_BY_TWO, "--shard"), unreadable_validation),
        ),
        "unreadable, resumed": (2, resume("unreadable")),
        "memory": (2, memory_of_steps),
        # killed at its third step, and started again by torchrun with the same command
        "elastic": (
            2,
            command(
                begin("elastic", *TWO_BY_TWO, "--shard"),
                in_first_attempt(
                    at_step(3, 1, killed_after(runs.step_folder(folder / "elastic" / "run", 2)))
                ),
            ),
        ),
        "diverged": (
            2,
            command(
                begin("diverged", *TWO_BY_TWO, "--shard", "--steps=30", "--eval-every=99"),
                infinite_mlp,
            ),
        ),
        "spike": (
            2,
            command(begin("spike", *STEADY, "--shard", "--on-spike=rollback"), spiking),
        ),
        "unknown flag": (2, command(["--no-such-flag"])),
    }
    table["compiled"] = (2, command(begin("compiled", *TWO_BY_TWO, "--compile"), compile_in_python))
    # the disk of one rank is full, or may not be written to
    for name, kind, step, rank, number in (
        ("full disk", "--shard", 4, 1, errno.ENOSPC),
        ("read-only", "--shard", 2, 1, errno.EROFS),
        ("full disk of rank 0", "--no-shard", 2, 0, errno.ENOSPC),
    ):
        fault = disk_fails(folder / name / "run", step, rank, number)
        table[name] = (2, command(begin(name, *TWO_BY_TWO, kind), fault))
    table["full disk, resumed"] = (2, resume("full disk"))
    # a padded vocabulary: sharded, by one process, and sharded again
    many = [f"--data={many_characters(folder / 'many.txt')}", "--tokenizer=char"]
    every = [*many, "--eval-every=1", "--sample-tokens=0"]
    table["padded alone"] = (
        1,
        command(begin("padded alone", *every, "--batch-size=2", "--grad-accum=4")),
    )
    table["padded"] = (2, command(begin("padded", *every, *TWO_BY_TWO, "--shard", "--steps=2")))
    table["padded, alone"] = (1, resume("padded", "--steps=3"))
    table["padded, sharded again"] = (2, resume("padded", "--steps=4"))
    return table


if __name__ == "__main__":
    chosen = scenarios(Path(sys.argv[1]), Path(sys.argv[2]))
    main({name: chosen[name] for name in sys.argv[3:] or chosen}, Path(sys.argv[2]))
