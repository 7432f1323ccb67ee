"""Time training steps of the fastgpt2 that this process imports: run by ``step_history``.

It uses only what every version of the package has, and nothing else of this repository, so that one
program times all versions. Prints the seconds of each step as JSON.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import fastgpt2
from fastgpt2 import GPT, GPTConfig

# GPT-2 124M as the suite trains it, and a tiny one: fields, batch, tokens
SCALES: dict[str, tuple[dict[str, Any], int, int]] = {
    "cpu": ({}, 2, 512),
    "dry": ({"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 64}, 1, 8),
}
STEP_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def allocator_module(package: Path) -> str | None:
    """The module that sets the host's allocator, wherever this version keeps it; None without."""
    # before it was `train`, the folder was `training`, beside a file of the other name
    found = [path.parent.name for path in package.glob("train*/allocator.py")]
    return f"fastgpt2.{found[0]}.allocator" if found else None


def measure(compiled: bool, dtype: torch.dtype, steps: int, scale: str) -> list[float]:
    """Seconds of each step of the package that this process imports."""
    allocator = allocator_module(Path(fastgpt2.__file__).parent)
    if allocator is not None:
        # as the training command does
        import_module(allocator).keep_freed_memory()
    fields, B, T = SCALES[scale]
    torch.manual_seed(0)
    model = GPT(GPTConfig(**fields))
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cpu")
    parameters = list(model.parameters())
    idx, targets = torch.randint(model.config.vocab_size, (2, B, T))
    forward: Any = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    seconds = []
    # the first two compile and allocate
    for _ in range(steps + 2):
        start = perf_counter()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = forward(idx, targets)[1]
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(perf_counter() - start)
    return seconds[2:]


if __name__ == "__main__":
    form, dtype, steps, scale = sys.argv[1:]
    print(json.dumps(measure(form == "compiled", STEP_DTYPES[dtype], int(steps), scale)))
