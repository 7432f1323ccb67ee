"""Several GPUs, as far as PyTorch's device guards can see: one of them is the current device."""

import pytest
import torch


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
