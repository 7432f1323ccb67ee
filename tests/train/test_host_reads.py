"""Between two records of the log, nothing makes the host wait for the device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
def test_only_a_record_reads_the_losses(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_train_config(data, steps=7, log_every=4, eval_every=100, dropout=0.0)
    trainer = make_trainer(config, tmp_path / "run")
    whole = TrainingStep.__call__
    begins: list[int] = []

    def step(*arguments: Any) -> Any:
        begins.append(reads.count)
        return whole(*arguments)

    monkeypatch.setattr(TrainingStep, "__call__", step)
    with HostReads() as reads:
        trainer.run()
    # from the beginning of a step to that of the next; steps 1 and 4 end with a record
    between = {n: begins[n] - begins[n - 1] for n in range(1, 7)}
    assert [between[n] for n in (2, 3, 5, 6)] == [0, 0, 0, 0]


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
def test_a_step_does_not_wait_for_a_gpu() -> None:
    step = plain_step("cuda")
    idx, targets = tiny_batch()
    batches = [(idx.pin_memory(), targets.pin_memory())] * 2
    step(batches, lr=1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batches, lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
