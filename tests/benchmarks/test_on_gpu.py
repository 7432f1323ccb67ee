"""A stage of ``on_gpu.sh`` that runs out of time is told so, and can write what it has."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.results import Run
from benchmarks.summary import summary
from tests.benchmarks.dry import ENVIRONMENT, ROOT
from tests.results_so_far import breadth_first
from tests.test_architecture import imports, parse


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


SLOW = """
import time
import pytest

@pytest.mark.parametrize("n", range(9), ids=lambda n: f"{n}-rehearsal")
def test_wide(n):
    pass

@pytest.mark.parametrize("full", [False], ids=["rehearsal"])
def test_wrong(full):
    assert 1 == 2, "what went wrong"

@pytest.mark.parametrize("full", [False], ids=["rehearsal"])
def test_endless(full):
    time.sleep(600)
"""


def test_a_killed_run_leaves_the_results_so_far(tmp_path: Path) -> None:
    """Killed without notice, in the middle of a test."""
    file, out = tmp_path / "test_slow.py", tmp_path / "out"
    file.write_text(SLOW, encoding="utf-8")
    process = subprocess.Popen(
        ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), str(out), "correct"],
        env=ENVIRONMENT | {"TESTS": str(file)},
        start_new_session=True,
    )
    results = out / "correct.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not results.exists() or results.read_text("utf-8").count("\n") < 2:
            assert process.poll() is None, (out / "correct.log").read_text("utf-8")
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    lines = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    found = {line["test"].rpartition("::")[2]: line for line in lines}
    # one parameter set of the nine
    assert {name: line["outcome"] for name, line in found.items()} == {
        "test_wide[0-rehearsal]": "passed",
        "test_wrong[rehearsal]": "failed",
    }
    assert "what went wrong" in found["test_wrong[rehearsal]"]["why"]
    assert "correct: 2 tests, 1 passed, 1 failed" in summary(out)


RACES = """
import time
from benchmarks.harness import Race

class Quick(Race):
    group = "quick"
    contenders = ("fastgpt2 a", "b")

    def prepare(self, name, settings):
        return lambda: None

    def facts(self, name, seconds, ceilings):
        return {"n": 1}

class Endless(Quick):
    group = "endless"

    def prepare(self, name, settings):
        time.sleep(600)

def races(settings):
    return [Quick(), Endless()]

def test_race(lane, record):
    record(lane)
"""


def test_a_killed_benchmark_leaves_the_races_so_far(tmp_path: Path) -> None:
    """Killed without notice, in the middle of the second race."""
    file, results = tmp_path / "bench_slow.py", tmp_path / "kernels.json"
    file.write_text(RACES, encoding="utf-8")
    command = ["-m", "pytest", "-p", "benchmarks.conftest", "-p", "no:cacheprovider", "-q"]
    command += ["--scale", "dry", "--json-so-far", str(results), str(file)]
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not results.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    (group,) = Run.of([results]).groups().items()
    assert (group[0], [entry.contender for entry in group[1]]) == ("quick", ["fastgpt2 a", "b"])
    assert "fastgpt2 a" in summary(tmp_path)


def test_every_benchmark_is_written_as_it_goes() -> None:
    script = (ROOT / "benchmarks" / "on_gpu.sh").read_text(encoding="utf-8")
    assert '--json-so-far "$out/$stage.json"' in script and "--benchmark-json" not in script


def test_the_first_of_every_test_come_first() -> None:
    names = [*(f"a[{i}]" for i in range(6)), "b", "c[0]", "c[1]"]
    items = [SimpleNamespace(nodeid=name) for name in names]
    chosen = [item.nodeid for item in breadth_first(items, 3)]  # type: ignore[arg-type]
    assert chosen == ["a[0]", "b", "c[0]", "a[2]", "c[1]", "a[4]"]


def test_correct_comes_after_warm_and_is_capped() -> None:
    script = (ROOT / "benchmarks" / "on_gpu.sh").read_text(encoding="utf-8")
    assert re.search(r"^stages=\(warm correct ", script, re.MULTILINE)
    assert "--most-per-test" in script and "--results-so-far" in script


def _gpu_tests() -> list[Path]:
    """The files that the stage ``correct`` collects."""
    script = (ROOT / "benchmarks" / "on_gpu.sh").read_text(encoding="utf-8")
    found = re.search(r"^which=\(-m gpu (.*)\) sets=", script, re.MULTILINE)
    assert found is not None
    paths = [ROOT / name for name in found.group(1).split()]
    return [file for path in paths for file in ([path] if path.is_file() else path.glob("*.py"))]


def test_no_gpu_test_is_forgotten() -> None:
    marked = re.compile(r"mark\.gpu\b|\bon_gpu\(|\brehearsed\b|\bgrid\(")
    for path in (ROOT / "tests").rglob("test_*.py"):
        # the training's own want more modules than the script does, and two GPUs
        others = path.parent.name in ("benchmarks", "train")
        if not others and marked.search(path.read_text(encoding="utf-8")):
            assert path in _gpu_tests(), path


def test_the_gpu_s_tests_import_what_is_there() -> None:
    """One file that cannot be imported would end the stage before its first test."""
    there = {"torch", "triton", "numpy", "pytest", "fastgpt2", "tests", "benchmarks", "tools"}
    for path in _gpu_tests():
        at_once = set(parse(path).body)
        for node, module in imports(path):
            name = module.split(".")[0]
            known = name in there or name in sys.stdlib_module_names
            assert known or node not in at_once, f"{path.name} imports {name}"
