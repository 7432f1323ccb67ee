"""Processors that a test can pretend to run on: which library multiplies is asked of each."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

# the package exports functions under the names of these modules
_linear = importlib.import_module("fastgpt2.kernels.linear")
_blocked_attention = importlib.import_module("fastgpt2.kernels.blocked_attention")

ALWAYS, FEW, NEVER = _linear.Share(1, sys.maxsize), _linear.Share(4, 65), _linear.Share()
FORWARD = _linear.Share(1, sys.maxsize, gradients=False)


def give_onednn(monkeypatch: pytest.MonkeyPatch, share: Any) -> None:
    """Its share of the products, however small they are."""
    monkeypatch.setattr(_linear, "_ONEDNN", share)
    monkeypatch.setattr(_linear, "_FEWEST", 1)


@dataclass(frozen=True)
class Processor:
    """What PyTorch and Linux say of a processor, and what is oneDNN's share on it."""

    name: str
    info: str | None
    capability: str
    has_mkl: bool
    has_amx: bool
    onednn: Any

    def install(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        """Make the kernels believe that this is the machine; ``folder`` holds its description."""
        path = folder / "cpuinfo"
        if self.info is not None:
            path.write_text(f"processor: 0\nvendor_id: {self.info}\n", encoding="utf-8")
        monkeypatch.setattr(_linear.platform, "processor", lambda: "")
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: self.has_mkl)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: self.capability)
        give_onednn(monkeypatch, _linear._share_of_onednn(path))
        monkeypatch.setattr(_blocked_attention, "_HAS_AMX", self.has_amx)


PROCESSORS = (
    Processor("AMD with AVX-512", "AuthenticAMD", "AVX512", True, False, ALWAYS),
    Processor("AMD with AVX2", "AuthenticAMD", "AVX2", True, False, FORWARD),
    Processor("AMD without AVX2", "AuthenticAMD", "DEFAULT", True, False, NEVER),
    Processor("Intel with AMX", "GenuineIntel", "AVX512", True, True, FEW),
    Processor("Intel with AVX-512", "GenuineIntel", "AVX512", True, False, FEW),
    Processor("Intel with AVX2", "GenuineIntel", "AVX2", True, False, NEVER),
    Processor("ARM", "", "DEFAULT", False, False, NEVER),
    Processor("not described", None, "DEFAULT", True, False, NEVER),
)
