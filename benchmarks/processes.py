"""Run measurements in separate processes and collect them in a file."""

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
    """The last line that ``command`` prints, as JSON; if it fails, None, with its stderr shown."""
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"{name}: {done.stderr}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def write_runs(path: Path, dtype: str, runs: Sequence[Mapping[str, Any]]) -> None:
    """Write all runs so far, with the machine, so that a later failure loses nothing."""
    report = {"machine": machine(torch.device("cpu")), "dtype": dtype, "runs": runs}
    write_text(path, json.dumps(report, indent=1) + "\n")
