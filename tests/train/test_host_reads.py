"""Nothing makes the host wait for the device; a record of the log is read one step late."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt2.train.guard import KeptStep
from fastgpt2.train.metrics import read_metrics
from fastgpt2.train.records import Record
from fastgpt2.train.step import TrainingStep
from tests.tiny_gpt import tiny_batch, tiny_gpt
from tests.train.tiny_run import make_trainer, tiny_train_config


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what copies a number from the device to the host: ``item``, ``tolist``, ``bool``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("no_picture")
def test_a_record_is_read_after_the_step_that_follows_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_train_config(data, steps=9, log_every=4, eval_every=6, dropout=0.0)
    trainer = make_trainer(config, tmp_path / "run")
    whole, read = TrainingStep.__call__, Record.read
    events: list[str] = []
    begins: list[int] = []

    def step(*arguments: Any) -> Any:
        begins.append(reads.count)
        events.append(f"step {len(begins)}")
        return whole(*arguments)

    def read_record(self: Record) -> Any:
        events.append(f"read {self.last.step}")
        return read(self)

    monkeypatch.setattr(TrainingStep, "__call__", step)
    monkeypatch.setattr(Record, "read", read_record)
    with HostReads() as reads:
        trainer.run()
    order = "step 1, step 2, read 1, step 3, step 4, step 5, read 4, step 6, step 7, step 8, step 9"
    # the last evaluation waits for the records of steps 8 and 9
    assert events == [*order.split(", "), "read 8", "read 9"]
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "train_loss" in r] == [1, 4, 8, 9]
    # from the beginning of a step to that of the next, nothing else reads from the device; the
    # evaluation of step 6 does
    between = {n: begins[n] - begins[n - 1] for n in range(1, 9)}
    assert {n for n, count in between.items() if count} <= {6}


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("length", [{"steps": 3}, {"steps": None, "minutes": 0.001}])
def test_the_last_record_is_written_before_the_end(
    data: Path, tmp_path: Path, length: dict[str, Any]
) -> None:
    config = tiny_train_config(data, log_every=100, eval_every=100, **length)
    outcome = make_trainer(config, tmp_path / "run").run()
    records = [r for r in read_metrics(tmp_path / "run") if "train_loss" in r]
    assert [r["step"] for r in records] == sorted({1, outcome.step})
    assert outcome.train_loss == records[-1]["train_loss"]


def plain_step(device: str) -> TrainingStep:
    model = tiny_gpt().to(device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device)
    return TrainingStep(
        model,
        optimizer,
        dtype=torch.float32,
        grad_clip=1.0,
        forward=model,
        poll=lambda: None,
    )


def test_a_step_reads_nothing_from_the_device() -> None:
    step = plain_step("cpu")
    step([tiny_batch()], lr=1e-3)
    with HostReads() as reads:
        result = step([tiny_batch(), tiny_batch()], lr=1e-3)
    assert reads.count == 0
    with HostReads() as reads:
        result.loss.item()
    assert reads.count == 1


@pytest.mark.gpu
def test_neither_a_step_nor_a_record_waits_for_a_gpu() -> None:
    step = plain_step("cuda")
    idx, targets = tiny_batch()
    batches = [(idx.pin_memory(), targets.pin_memory())] * 2
    step(batches, lr=1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [step(batches, lr=1e-3), step(batches, lr=1e-3)]
        last = KeptStep(step.model, batches, {}, step=2)
        record = Record(results, last, lr=1e-3, tokens=0, elapsed=0.0)
        step(batches, lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    read, _ = record.read()
    assert read == [(float(loss), float(norm)) for loss, norm in results]
