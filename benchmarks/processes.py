"""Measurements in processes of their own, and the file in which a command collects them."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from fastgpt2.files import write_text


def ask(name: str, command: Sequence[str], **environment: str) -> Any:
    """What ``command`` prints last, as JSON; None, after its own words on stderr, if it fails."""
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"{name}: {done.stderr}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def write_runs(path: Path, dtype: str, runs: Sequence[Mapping[str, Any]]) -> None:
    """All runs so far, with the machine: what was measured is not lost when the rest is."""
    report = {"machine": machine(torch.device("cpu")), "dtype": dtype, "runs": runs}
    write_text(path, json.dumps(report, indent=1) + "\n")
