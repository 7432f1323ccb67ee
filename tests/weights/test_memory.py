"""Loading a model needs little more memory than the model: peak resident memory, measured."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt2.config import GPTConfig
from fastgpt2.weights import save
from fastgpt2.weights.checkpoint import Checkpoint, parameter_shapes
from fastgpt2.weights.tensors import LazyTensor

# a small gpt2-xl: 320 MB in float32; as there, the token embedding is 5 % of it and is padded in
# memory
CONFIG = GPTConfig(block_size=256, vocab_size=8191, n_layer=24, n_head=8, n_embd=512)
LIMIT = 1.15
# the three ways to read: a mapped file that we parse, safetensors, torch's zip. llm.c's format uses
# the first, runs the second
READERS = ("openai", "hf", "nanogpt")
TINY = str(Path(__file__).parents[1] / "golden" / "openai-tiny")


def measure(path: str) -> float:
    """Peak memory of loading ``path``, over the size of the model."""
    from fastgpt2.model import GPT

    # a forked process maps the pages of libraries as it meets them
    GPT.from_pretrained(TINY)
    with open("/proc/self/statm", encoding="utf-8") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    model = GPT.from_pretrained(path)
    size = sum(parameter.nbytes for parameter in model.parameters())
    # the pages are really there
    assert all(float(parameter.sum()) == 0.0 for parameter in model.parameters())
    assert size > 300e6
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / size


def main(*paths: str) -> None:
    """Measure each path in its own process, forked after the imports: one line each."""
    from fastgpt2.model import GPT

    # PyTorch's imports on first use are not part of a model
    GPT.from_pretrained(TINY)
    for path in paths:
        if os.fork() == 0:
            print(measure(path), flush=True)
            os._exit(0)
        assert os.wait()[1] == 0, path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and ru_maxrss in KiB")
def test_peak_memory_of_loading(tmp_path: Path) -> None:
    tensors = {
        name: LazyTensor.zeros(shape, torch.float32)
        for name, shape in parameter_shapes(CONFIG).items()
    }
    checkpoint = Checkpoint(CONFIG, tensors, Path("zeros"))
    paths = [str(save(checkpoint, tmp_path / format, format)) for format in READERS]
    done = subprocess.run(
        [sys.executable, "-m", "tests.weights.test_memory", *paths],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ratios = dict(zip(READERS, map(float, done.stdout.split()), strict=True))
    assert all(1.0 <= ratio <= LIMIT for ratio in ratios.values()), ratios


if __name__ == "__main__":
    main(*sys.argv[1:])
