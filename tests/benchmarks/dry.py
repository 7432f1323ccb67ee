"""Runs of the suite, tiny and interpreted: so that no line of it is new on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# without what pytest-xdist tells its workers: in one of them pytest-benchmark would time nothing
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {
    "TRITON_INTERPRET": "1",
    "DRY": "1",
    "PYTHON": sys.executable,
}
QUICK = ("-m", "tests.benchmarks.quickened")


def quick_python(folder: Path) -> str:
    """An interpreter of Python whose interpreter of kernels is quick."""
    path = folder / "python"
    # the summary interprets none, and would wait for Triton
    text = f"""#!/bin/sh
    [ "$2" = benchmarks.summary ] || set -- {" ".join(QUICK)} "$@"
    exec "{sys.executable}" "$@"
    """
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def on_gpu(folder: Path, *stages: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """``benchmarks/on_gpu.sh``, as a dry run."""
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), str(folder), *stages],
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """``pytest --benchmark-only --scale dry`` in a process of its own."""
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-q", "--benchmark-only", "--scale", "dry"]
    return subprocess.run(
        [sys.executable, *QUICK, *command, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
