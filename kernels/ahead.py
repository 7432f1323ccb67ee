"""Compiling the kernels of a computation before it runs: all at once instead of one by one."""

import os
from collections.abc import Callable

from fastgpt2.kernels.backend import INTERPRETED


def compile_ahead(step: Callable[[], object], workers: int | None = None) -> int:
    """Compile, in parallel, every Triton kernel that ``step`` launches.

    ``step`` is called once, but its kernels do not run: it sees uninitialised memory, so discard
    its results, gradients included. Library calls do run. It needs the sizes, dtypes and strides of
    the real computation, which decide what is compiled.

    Args:
        step: the computation; nothing it does may depend on the numbers.
        workers: number of threads; None means one per core.

    Returns:
        How many binaries it needs. Where kernels are interpreted it is 0: ``step`` is not called.
    """
    if INTERPRETED:
        return 0
    from fastgpt2.kernels.jit.launch import Launch, compile_noted, noting

    launches: list[Launch] = []
    with noting(launches):
        step()
    return compile_noted(launches, workers or os.cpu_count() or 1) if launches else 0
