"""Before anything imports triton: without a CUDA GPU, its kernels are interpreted."""

import gc
import os
import signal
import sys
from pathlib import Path

import pytest

if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    # a run starts many processes, and each would compile every module that it imports
    sys.dont_write_bytecode = False

if "PYTEST_XDIST_WORKER" in os.environ:
    # `-n auto` starts a process per core: more threads would only wait for each other. The library
    # reads this once, when torch is loaded; the programs that tests start inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # until all tests are imported, nothing is garbage
    gc.disable()

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# what a script starts in the background, or with nohup, ignores signals, and so would the programs
# under test
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# a quarter of a minute to two minutes each: begun first, the longest of all at the beginning, since
# one of them at the end would leave cores idle
LONGEST = (
    "benchmarks/test_suite.py",
    "train/test_ranks.py",
    "kernels/test_end_to_end.py",
    "test_packaging.py",
    "test_compile.py",
    "kernels/test_attention.py",
    "commands/test_surroundings.py",
    "train/test_faults.py",
    "integrations/test_ecosystem.py",
    "kernels/test_report.py",
    "kernels/test_launch.py",
    "kernels/test_decode_attention.py",
    "kernels/test_embedding.py",
    "train/test_kill.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist keep our order; its own begins with the files that have most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_finish() -> None:
    """What was imported stays: no search for garbage has to go through it again."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; skip what needs a GPU, with the reason, where none is used."""
    place = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    if not torch.cuda.is_available():
        reason = "needs a CUDA GPU"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        reason = "TRITON_INTERPRET=1 keeps the kernels off the GPU"
    else:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))
