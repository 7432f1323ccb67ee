"""Before anything imports triton: without a CUDA GPU, its kernels are interpreted."""

import os
import signal

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # `-n auto` starts a process per core: more threads would only wait for each other. The library
    # reads this once, when torch is loaded; the programs that tests start inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# what a script starts in the background, or with nohup, ignores signals, and so would the programs
# under test
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU, with the reason, where there is none or it is not used."""
    if not torch.cuda.is_available():
        reason = "needs a CUDA GPU"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        reason = "TRITON_INTERPRET=1 keeps the kernels off the GPU"
    else:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))
