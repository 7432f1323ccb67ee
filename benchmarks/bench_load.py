"""How long it takes to load a model: reading each weight format, and imports.

The weights are random, of a small GPT-2 with the full vocabulary, and must be read bit for bit. The
files are in the system's cache. An import is timed as a fresh Python process, start and end
included: fastgpt2's own cost is the difference from PyTorch's.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.harness import Lane, Race, Scale, Settings
from benchmarks.rivals import is_conv1d
from benchmarks.timing import Ceilings, Work
from fastgpt2.config import GPTConfig
from fastgpt2.model import GPT
from fastgpt2.weights import FORMATS, Checkpoint, save
from fastgpt2.weights.checkpoint import parameter_shapes
from fastgpt2.weights.tensors import LazyTensor

PROGRAMS = {
    "fastgpt2": "from fastgpt2 import GPT",
    "torch": "import torch",
    "transformers": "from transformers import GPT2LMHeadModel",
}


class WeightsRace(Race):
    """One model from every format; transformers reads its own."""

    contenders = (*FORMATS, "transformers")

    def __init__(self, config: GPTConfig) -> None:
        self.config = config
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        with torch.device("meta"):
            self._parameters = GPT(config).get_num_params(non_embedding=False)
        self.group = f"load weights fp32 {self._parameters / 1e6:.0f}M parameters"

    def _written(self, format: str) -> Path:
        """The model in a format, written on first use."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory()
            torch.manual_seed(0)
            self._model = GPT(self.config)
        folder = Path(self._folder.name, format)
        if not folder.exists():
            state = self._model.state_dict()
            tensors = {n: LazyTensor.of(state[n]) for n in parameter_shapes(self.config)}
            save(Checkpoint(self.config, tensors, folder), folder, format)
        return folder

    def _reader(self, name: str, folder: Path) -> Callable[[], nn.Module]:
        if name != "transformers":
            return lambda: GPT.from_pretrained(str(folder))
        try:
            from transformers import GPT2LMHeadModel
        except ImportError:
            pytest.skip("transformers is not installed: pip install 'fastgpt2[bench]'")

        def read() -> nn.Module:
            model: nn.Module = GPT2LMHeadModel.from_pretrained(folder)
            return model

        return read

    def prepare(self, name: str, settings: Settings) -> Work:
        """A reader; its model must have exactly the weights that were written."""
        read = self._reader(name, self._written("hf" if name == "transformers" else name))
        found = read().state_dict()
        for key, x in self._model.state_dict().items():
            # transformers stores these four transposed, as OpenAI does
            swapped = name == "transformers" and is_conv1d(key)
            same = found[key].t() if swapped else found[key]
            assert torch.equal(same, x), f"{name}: {key} is not what was written"
        return read

    def facts(self, name: str, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
        """Bytes of weights per second."""
        size = 4 * self._parameters
        return {"bytes": size, "GB_per_s": size / seconds / 1e9}

    def is_ours(self, name: str) -> bool:
        """All except transformers' reader."""
        return name != "transformers"

    def close(self) -> None:
        """Delete the files."""
        if self._folder is not None:
            self._folder.cleanup()


class ImportRace(Race):
    """A fresh process that imports one thing."""

    group = "import in a fresh process"

    def __init__(self, dry: bool) -> None:
        # a rehearsal does not wait for the largest
        self.contenders = tuple(PROGRAMS)[: 2 if dry else None]

    def prepare(self, name: str, settings: Settings) -> Work:
        """Start the process once, to warm the system's caches."""
        command = [sys.executable, "-c", PROGRAMS[name]]

        def work() -> None:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if "No module named 'transformers'" in done.stderr:
                pytest.skip("transformers is not installed: pip install 'fastgpt2[bench]'")
            assert done.returncode == 0, done.stderr

        if settings.scale is not Scale.DRY:
            work()
        return work

    def facts(self, name: str, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
        """What was imported."""
        return {"program": PROGRAMS[name]}


def races(settings: Settings) -> list[Race]:
    """Reading weights, and importing."""
    dry = settings.scale is Scale.DRY
    tiny = GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=2, n_embd=32)
    return [WeightsRace(tiny if dry else GPTConfig.preset("gpt2-mini")), ImportRace(dry)]


def test_load(lane: Lane, record: Callable[[Lane], None]) -> None:
    """One format, or one import."""
    record(lane)
