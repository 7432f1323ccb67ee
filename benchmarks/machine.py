"""What a reader needs to judge the numbers of a run: the machine, its versions, the commit."""

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


def _cpu_name() -> str:
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """Device, clocks, driver, processor, cores, versions, commit and date."""
    query = "name,driver_version,clocks.sm,clocks.mem,power.limit"
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "nvidia_smi": _output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "cpu_model": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # how busy the machine was with something else
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{name: _version_of(name) for name in VERSIONS},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        # with -dirty where the tree is not what was committed
        "commit": _output_of("git", "describe", "--always", "--dirty", "--exclude=*"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
