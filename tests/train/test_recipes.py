"""The commands and job scripts of docs/scaling.md: every flag exists, a job queues itself again."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from fastgpt2.train.__main__ import build_parser

TEXT = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(?:console|bash)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
# a value for each of the shell's variables
VALUES = {"run": "runs/mine", "more[@]": "--shard", "head": "a", "SLURM_JOB_ID": "7"}


def commands() -> list[list[str]]:
    """The words of each command that trains."""
    found = []
    for block in BLOCKS:
        for line in block.replace("\\\n", " ").splitlines():
            plain = re.sub(r"\$\{?([\w\[\]@]+)\}?", lambda match: VALUES.get(match[1], "x"), line)
            if "-m fastgpt2.train" in plain:
                found.append(shlex.split(plain.rstrip("& "), comments=True))
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_has_flags_that_exist(words: list[str]) -> None:
    if "torchrun" in words:
        launch = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
        assert launch.module and launch.training_script == "fastgpt2.train"
        build_parser().parse_args(launch.training_script_args)
    else:
        assert words[:3] == ["python", "-m", "fastgpt2.train"]
        build_parser().parse_args(words[3:])


def test_all_recipes_were_found() -> None:
    assert len(commands()) == 5
    assert sum(block.startswith("#!/bin/bash\n#SBATCH") for block in BLOCKS) == 2


TORCHRUN = """#!/bin/bash
# stands for a job that saves at SIGTERM, and ends by itself if it is resumed
run={run}
trap 'mkdir -p "$run/checkpoints/step_00000003"; exit 1' TERM
mkdir -p "$run"
touch "$run/config.toml"
echo "$@" >> "{log}"
case "$*" in *--resume*) exit 0;; esac
for i in $(seq 600); do sleep 0.05; done
"""


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    """The job script, with programs that stand for torchrun and Slurm's."""
    (script,) = (block for block in BLOCKS if "requeue" in block)
    programs = tmp_path / "bin"
    programs.mkdir()
    text = TORCHRUN.format(run=tmp_path / "run", log=tmp_path / "torchrun")
    (programs / "torchrun").write_text(text, encoding="utf-8")
    slurm = f'#!/bin/bash\necho "$@" >> "{tmp_path / "scontrol"}"\n'
    (programs / "scontrol").write_text(slurm, encoding="utf-8")
    for program in programs.iterdir():
        program.chmod(0o755)
    path = tmp_path / "job"
    path.write_text(script.replace("/shared/runs/mine", str(tmp_path / "run")), encoding="utf-8")
    return ["env", f"PATH={programs}:{os.environ['PATH']}", "SLURM_JOB_ID=7", "bash", str(path)]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("lost_before", [False, True], ids=["new", "lost before a checkpoint"])
def test_a_job_queues_itself_again(job: list[str], tmp_path: Path, lost_before: bool) -> None:
    if lost_before:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.toml").touch()
    said = tmp_path / "torchrun"
    # env becomes bash: the signal goes to the script alone, as --signal=B: asks
    with subprocess.Popen(job) as process:
        while not said.exists() or not said.read_text(encoding="utf-8"):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert (tmp_path / "scontrol").read_text(encoding="utf-8") == "requeue 7\n"
    # the next job resumes the run, comes to its end, and queues nothing
    assert subprocess.run(job, timeout=60, check=False).returncode == 0
    first, second = said.read_text(encoding="utf-8").splitlines()
    assert ("--overwrite" in first) == lost_before
    assert "--data" in first and "--resume" not in first
    assert second.endswith("--resume") and "--data" not in second
    assert (tmp_path / "scontrol").read_text(encoding="utf-8") == "requeue 7\n"
