"""``python -m tools.save_cost``: how much a checkpoint slows the training step that begins it.

Plain steps and steps that begin a checkpoint alternate. After each, the tool waits for the writing
thread, outside the measured time. A checkpoint that is waited for is also timed. Prints JSON:
medians in seconds, and the median of the pairs' ratios.
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

from fastgpt2.config import GPTConfig
from fastgpt2.devices import resolve_device, resolve_dtype
from fastgpt2.model import GPT
from fastgpt2.train import checkpoint
from fastgpt2.train.saver import Saver
from fastgpt2.train.step import TrainingStep


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """How long ``work`` takes, the device included."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measure(
    config: GPTConfig, batch_size: int, pairs: int, device: torch.device
) -> dict[str, float]:
    """Medians of ``pairs`` pairs of steps.

    Args:
        config: the model.
        batch_size: sequences per step.
        pairs: number of pairs.
        device: where the model is.
    """
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
    saving: list[float] = []
    blocking: list[float] = []

    def train() -> None:
        step([(idx, idx)], lr=1e-3)

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)

        def save(number: int) -> None:
            saver.begin(checkpoint.staged(run, number, model, optimizer, {}))

        def save_and_train(number: int) -> None:
            save(number)
            train()

        def save_and_wait(number: int) -> None:
            save(number)
            saver.wait()

        train()
        for pair in range(pairs):
            for saves in (False, True) if pair % 2 else (True, False):
                if not saves:
                    plain.append(seconds(train, device))
                    continue
                saving.append(seconds(partial(save_and_train, pair), device))
                saver.wait()
            blocking.append(seconds(partial(save_and_wait, pairs + pair), device))
            checkpoint.prune(run, 1)
    return {
        "parameters": model.get_num_params(non_embedding=False),
        "tokens": idx.numel(),
        "plain_step": median(plain),
        "saving_step": median(saving),
        "ratio": median(b / a for a, b in zip(plain, saving, strict=True)),
        "waited_for": median(blocking),
    }


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m tools.save_cost", description=__doc__)
    parser.add_argument("--n-layer", type=int, default=6, help="number of blocks [%(default)s]")
    parser.add_argument("--n-embd", type=int, default=384, help="width C [%(default)s]")
    parser.add_argument("--block-size", type=int, default=256, help="context length [%(default)s]")
    parser.add_argument("--vocab-size", type=int, default=50257, help="number of ids [%(default)s]")
    parser.add_argument(
        "--batch-size", type=int, default=4, help="sequences per step [%(default)s]"
    )
    parser.add_argument("--pairs", type=int, default=5, help="pairs of steps [%(default)s]")
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, ... [%(default)s]"
    )
    options = parser.parse_args(argv)
    config = GPTConfig(
        n_layer=options.n_layer,
        n_head=max(options.n_embd // 64, 1),
        n_embd=options.n_embd,
        block_size=options.block_size,
        vocab_size=options.vocab_size,
    )
    device = resolve_device(options.device)
    print(json.dumps(measure(config, options.batch_size, options.pairs, device), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
