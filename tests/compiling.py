"""Kernels compiled for GPUs that are not there, in a Python process of its own.

A test's own process interprets kernels and cannot compile them. So that a test's name says what it
proves, every test that comes here has ``binary`` or ``binaries`` in its name, and no other has:
``tests/test_architecture.py`` looks.
"""

import os
import subprocess
import sys


def run_compiling(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """``python ARGUMENTS``, where a kernel is what the compiler makes of it."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run(
        [sys.executable, *arguments], env=variables, capture_output=True, text=True, check=False
    )
