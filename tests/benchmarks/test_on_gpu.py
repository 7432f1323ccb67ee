"""A stage of ``on_gpu.sh`` that runs out of time is told so, and can write what it has."""

import re
import signal
import subprocess

import pytest

from tests.benchmarks.dry import ROOT


def _ignore_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# what a script starts in the background ignores Ctrl-C
@pytest.mark.parametrize("prepare", [None, _ignore_ctrl_c], ids=["foreground", "background"])
def test_the_end_of_a_stages_time_is_a_ctrl_c(prepare: object) -> None:
    script = (ROOT / "benchmarks" / "on_gpu.sh").read_text(encoding="utf-8")
    function = re.search(r"^within\(\) \{.*?^\}", script, re.DOTALL | re.MULTILINE)
    assert function is not None
    stage = "trap 'kill $!; echo writes what it has; exit 0' INT; sleep 60 & wait"
    done = subprocess.run(
        ["bash", "-c", f'{function.group()}\nwithin 1 bash -c "$0"', stage],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=prepare,  # type: ignore[call-overload]
    )
    assert done.stdout == "writes what it has\n"
    # timeout's own exit code: the stage counts as failed
    assert done.returncode == 124


def test_every_stage_ends_this_way() -> None:
    script = (ROOT / "benchmarks" / "on_gpu.sh").read_text(encoding="utf-8")
    calls = re.findall(r'^ *(\S+) "\$seconds" "\$python"', script, re.MULTILINE)
    assert len(calls) == 4
    assert set(calls) == {"within"}
