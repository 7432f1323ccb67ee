"""Several GPUs, as far as PyTorch's device guards can see: one of them is the current device."""

from types import SimpleNamespace

import pytest
import torch

from fastgpt2.kernels import backend, tuning


class PlayedGPUs:
    """GPU 0 is the current device, until a guard selects another one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        # what `torch.cuda.device` calls when it is entered and left
        for name in ("_exchange_device", "_maybe_exchange_device"):
            monkeypatch.setattr(torch.cuda, name, self._exchange)

    def _exchange(self, index: int) -> int:
        previous, self.current = self.current, index if index >= 0 else self.current
        return previous


def play_architecture(monkeypatch: pytest.MonkeyPatch, architecture: tuple[int, int] | str) -> None:
    """Every GPU is of this compute capability, or of this architecture of AMD's."""
    amd = isinstance(architecture, str)
    properties = SimpleNamespace(gcnArchName=architecture)
    monkeypatch.setattr(torch.version, "hip", "7.2" if amd else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: architecture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index=None: properties)
    for module in (backend, tuning):
        monkeypatch.setattr(module, "INTERPRETED", False)
    tuning._architecture.cache_clear()
