"""Freed memory stays with the process, seen from the page faults of a process of its own."""

import subprocess
import sys

import pytest

from fastgpt2.train.allocator import keep_freed_memory

_FAULTS = """
import resource
import torch
from fastgpt2.train.allocator import keep_freed_memory

if {keep}:
    assert keep_freed_memory()
for _ in range(16):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(keep: bool) -> int:
    """Pages that the system hands out for one more buffer of 64 MB after others, all freed."""
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS.format(keep=keep)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has the setting")
def test_a_freed_buffer_is_used_again() -> None:
    assert _faults(keep=True) < 100 < _faults(keep=False)


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
