"""The compiler that ``torch.compile`` calls: whether there is one, and one line if it fails."""

import os
import shutil
import sys
from textwrap import shorten

import torch

from fastgpt2.cli import in_one_line
from fastgpt2.devices import device_kind


def host_compiler() -> str:
    """The C++ compiler's name: the one that TorchInductor tries."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def compiler_obstacle(device: torch.device) -> str | None:
    """Why ``torch.compile`` cannot work here, or None: it needs a compiler for its host code."""
    language = device_kind(device).compiler
    if language is None:
        return f"not offered on {device.type}"
    if device_kind(device).host:
        wanted = [host_compiler()]
    else:
        # those that Triton tries
        wanted = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if os.name == "nt":
        wanted = ["cl"]
    if any(shutil.which(name) for name in wanted):
        return None
    return f"no {language} compiler found ({', '.join(wanted)})"


def failure(error: Exception) -> str:
    """The compiler's error in one line.

    A compiler that is found may still fail: no headers, a temporary folder that cannot execute, a
    cache that cannot be written.
    """
    reason = " ".join((in_one_line(error) or str(error)).split())
    return shorten(f"{type(error).__name__}: {reason}", 200, placeholder=" ...")
