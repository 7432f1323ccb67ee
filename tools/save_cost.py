"""``python -m tools.save_cost``: what a checkpoint costs the training steps that it falls into.

Plain steps and saves take turns. A save is a step that begins a checkpoint, copy included, and then
all the steps that are computed until the thread that writes has finished. Beside them the time of a
checkpoint that is waited for. JSON on stdout, medians over the saves:

- ``ratio``: the step that begins the checkpoint, over the plain steps before it;
- ``worst_ratio``: the slowest step of a save, over the plain steps;
- ``steps_while_writing``: steps of a save, the first one included;
- ``cost_in_steps``: what they took beyond as many plain steps, in plain steps.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

from fastgpt2.cli import Parser
from fastgpt2.cli import run as run_command
from fastgpt2.config import GPTConfig
from fastgpt2.devices import resolve_device, resolve_dtype
from fastgpt2.model import GPT
from fastgpt2.train import checkpoint
from fastgpt2.train.allocator import keep_freed_memory
from fastgpt2.train.saver import Saver
from fastgpt2.train.step import TrainingStep

# plain steps before a save
PLAIN = 3


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """How long ``work`` takes, the device included."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measure(
    config: GPTConfig, batch_size: int, count: int, device: torch.device
) -> dict[str, float]:
    """Medians of ``count`` saves.

    Args:
        config: the model.
        batch_size: sequences per step.
        count: number of saves.
        device: where the model is.
    """
    if device.type == "cpu":
        # as the training does
        keep_freed_memory()
    model = GPT(config).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
    step = TrainingStep(
        model,
        optimizer,
        dtype=resolve_dtype("auto", device),
        grad_clip=1.0,
        forward=model,
        poll=lambda: None,
    )
    idx = torch.randint(config.vocab_size, (batch_size, config.block_size))
    saver = Saver()
    plain: list[float] = []
    saves: list[list[float]] = []
    blocking: list[float] = []

    def train() -> None:
        step([(idx, idx)], lr=1e-3)

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)

        def save(number: int) -> None:
            saver.begin(checkpoint.staged(run, number, model, optimizer, {}), aside=True)

        def save_and_train(number: int) -> None:
            save(number)
            train()

        def save_and_wait(number: int) -> None:
            save(number)
            saver.wait()

        # the first ones make moments, and buffers that later ones use again
        train()
        save_and_wait(0)
        for number in range(1, 1 + count):
            plain.append(median(seconds(train, device) for _ in range(PLAIN)))
            steps = [seconds(partial(save_and_train, number), device)]
            while saver.is_busy():
                steps.append(seconds(train, device))
            saver.wait()
            saves.append(steps)
            blocking.append(seconds(partial(save_and_wait, count + number), device))
            checkpoint.prune(run, 1)
    pairs = list(zip(plain, saves, strict=True))
    return {
        "parameters": model.get_num_params(non_embedding=False),
        "tokens": idx.numel(),
        "threads": torch.get_num_threads(),
        "plain_step": median(plain),
        "saving_step": median(steps[0] for steps in saves),
        "ratio": median(steps[0] / alone for alone, steps in pairs),
        "worst_ratio": median(max(steps) / alone for alone, steps in pairs),
        "steps_while_writing": median(len(steps) for steps in saves),
        "cost_in_steps": median(sum(steps) / alone - len(steps) for alone, steps in pairs),
        "waited_for": median(blocking),
    }


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 0."""
    parser = Parser(prog="python -m tools.save_cost", description=__doc__)
    parser.add_argument("--n-layer", type=int, default=6, help="number of blocks [%(default)s]")
    parser.add_argument("--n-embd", type=int, default=384, help="width C [%(default)s]")
    parser.add_argument("--block-size", type=int, default=256, help="context length [%(default)s]")
    parser.add_argument("--vocab-size", type=int, default=50257, help="number of ids [%(default)s]")
    parser.add_argument(
        "--batch-size", type=int, default=4, help="sequences per step [%(default)s]"
    )
    parser.add_argument("--saves", type=int, default=5, help="number of saves [%(default)s]")
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, ... [%(default)s]"
    )
    options = parser.parse_args(argv)
    return run_command("save_cost", lambda: _body(options))


def _body(options: argparse.Namespace) -> int:
    config = GPTConfig(
        n_layer=options.n_layer,
        n_head=max(options.n_embd // 64, 1),
        n_embd=options.n_embd,
        block_size=options.block_size,
        vocab_size=options.vocab_size,
    )
    device = resolve_device(options.device)
    print(json.dumps(measure(config, options.batch_size, options.saves, device), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
