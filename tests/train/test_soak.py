"""The short form of ``python -m tools.soak``: ranks that are killed at random moments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KILLS = 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_sharded_ranks_that_are_killed_lose_nothing(data: Path, tmp_path: Path) -> None:
    """Two processes; after each kill, of one or of both, they end and are started again.

    The moments are spread over the time that the unbroken run takes, so what a kill meets differs.
    """
    kind = ("--ranks=2", "--shard", f"--kills={KILLS}")
    length = ("--steps=8", "--eval-every=2")
    command = [
        sys.executable,
        "-m",
        "tools.soak",
        str(data),
        str(tmp_path / "soak"),
        *kind,
        *length,
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads(result.stdout)
    assert (record["kills"], record["different"]) == (KILLS, 0)
    # a kill may find a rank in several places, as it saves while it trains
    assert sum(record["places"].values()) >= KILLS
