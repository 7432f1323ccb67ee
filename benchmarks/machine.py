"""The machine, versions and commit of a run, which a reader needs to judge its numbers."""

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_CPU_INFO = Path("/proc/cpuinfo")
VERSIONS = ("torch", "triton", "transformers", "ctranslate2")


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version_of(package: str) -> str | None:
    try:
        return str(metadata.distribution(package).version)
    except metadata.PackageNotFoundError:
        return None


def cpu_name(info: Path = _CPU_INFO) -> str:
    """The processor's name with its family and model, since a virtual machine's name says little.

    ``info`` is Linux's description of the processors.
    """
    if info.exists():
        first_core = info.read_text(encoding="utf-8").partition("\n\n")[0]
        parts = (line.partition(":") for line in first_core.splitlines())
        fields = {key.strip(): value.strip() for key, _, value in parts}
        if "model name" in fields:
            return "{model name} (family {cpu family}, model {model})".format_map(fields)
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """Device, clocks, driver, processor, cores, versions, commit and date."""
    query = "name,driver_version,clocks.sm,clocks.mem,power.limit"
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "nvidia_smi": _output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "cpu_model": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version_of(name) for name in VERSIONS},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        # ends in -dirty if there are uncommitted changes
        "commit": _output_of("git", "describe", "--always", "--dirty", "--exclude=*"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
