"""What runs on a GPU runs here, too, tiny and interpreted: so that no line of it is new there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import decode_gpu, exercise, kernels_gpu, step_gpu, summary, tune
from benchmarks.ops import op_cases
from benchmarks.timing import Ceilings, Clock, Timing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a dry run of every stage leaves."""
    out = tmp_path_factory.mktemp("gpu")
    assert kernels_gpu.main(["--dry", "--out", str(out)]) == 0
    assert step_gpu.main(["--dry", "--out", str(out)]) == 0
    assert decode_gpu.main(["--dry", "--out", str(out)]) == 0
    assert tune.main(["--dry", "--out", str(out)]) == 0
    return out


def test_every_op_is_timed_in_every_mode(folder: Path) -> None:
    report = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))
    seen = {(r["op"], r["mode"], r["provider"]) for r in report["results"]}
    for case in op_cases(dry=True):
        modes = ["forward"] if case.backward is None else ["forward", "backward", "both"]
        for mode in modes:
            for provider in ("triton", "eager", "compile", *case.rivals):
                assert (case.op, mode, provider) in seen
    assert report["wrong"] == {}


def test_all_contenders_step_and_decode(folder: Path) -> None:
    step = json.loads((folder / "step.json").read_text(encoding="utf-8"))
    assert not [note for note in step["notes"] if "not installed" not in note]
    names = [result["name"] for result in step["results"]]
    assert names[0] == names[-1] == "fastgpt2"
    assert {"fastgpt2 compiled", "plain compiled"} <= set(names)
    decode = json.loads((folder / "decode.json").read_text(encoding="utf-8"))
    assert {(r["name"], r["batch"]) for r in decode["results"]} >= {
        ("fastgpt2", 1),
        ("fastgpt2", 2),
    }


def test_every_kernel_is_tuned_and_right(folder: Path) -> None:
    from fastgpt2.kernels.jit.tuning import TABLE

    trials = json.loads((folder / "tune.json").read_text(encoding="utf-8"))["trials"]
    assert {trial["kernel"] for trial in trials} == set(TABLE)
    assert not [trial for trial in trials if trial["fault"]]
    # the table that is left is one that Python reads
    compile((folder / "tuning.py").read_text(encoding="utf-8"), "tuning.py", "exec")


def test_summary_names_every_stage(folder: Path) -> None:
    (folder / "correct.xml").write_text(
        '<testsuites><testsuite tests="2" failures="1"><testcase classname="a" name="b">'
        "<failure/></testcase></testsuite></testsuites>",
        encoding="utf-8",
    )
    text = summary.summary(folder)
    for line in (
        "correct: 2 tests, 1 failures",
        "FAILED a::b",
        "kernels on cpu",
        "tuning, fastest",
    ):
        assert line in text
    assert "training step, batch [2, 9]" in text
    assert "decoding 4 tokens after 5" in text


def test_every_kernel_is_exercised(capsys: pytest.CaptureFixture[str]) -> None:
    assert exercise.main() == 0
    assert len(capsys.readouterr().out.splitlines()) >= len(op_cases(dry=True))


def test_a_wrong_kernel_has_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(case: object, inputs: object) -> None:
        raise AssertionError("y0: over the budget")

    monkeypatch.setattr(kernels_gpu, "check", wrong)
    assert kernels_gpu.main(["--dry", "--op", "layer_norm", "--out", str(tmp_path)]) == 1
    assert "WRONG layer_norm" in capsys.readouterr().out
    assert json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))["results"] == []


TABLE_SOURCE = """
TABLE: dict[str, tuple[Rule, ...]] = {
    "a": (Rule({"D": 64}, {"sm_80": config(4, 2, BLOCK=64)}), Rule({}, {"sm_80": config(4, 1)})),
    "b": (Rule({}, {"sm_80": config(1, 1), "sm_90": config(2, 2, BLOCK=32)}),),
}
"""


def test_rewriting_the_table() -> None:
    replaced = tune.rewrite(TABLE_SOURCE, "b", 0, "sm_90", "config(8, 3, BLOCK=128)")
    assert replaced == TABLE_SOURCE.replace("config(2, 2, BLOCK=32)", "config(8, 3, BLOCK=128)")
    added = tune.rewrite(TABLE_SOURCE, "a", 0, "sm_90", "config(8, 3, BLOCK=128)")
    old = '{"sm_80": config(4, 2, BLOCK=64)}'
    new = '{"sm_90": config(8, 3, BLOCK=128), "sm_80": config(4, 2, BLOCK=64)}'
    assert added == TABLE_SOURCE.replace(old, new)


def test_timing_and_roofline() -> None:
    timing = Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (timing.median_us, timing.p20_us, timing.p80_us) == (3.5, 2.0, 5.0)
    ceilings = Ceilings(bandwidth=4e12, flops=8e14)
    assert ceilings.roofline_us(8e8, 8e6) == pytest.approx(2.0)
    assert ceilings.roofline_us(8e9, 8e6) == pytest.approx(10.0)


def test_the_clock_alternates() -> None:
    order: list[str] = []
    work = {name: (lambda name=name: order.append(name)) for name in "ab"}
    Clock(torch.device("cpu")).compare(work, seconds=0.0)
    assert order == ["a", "b"] * (len(order) // 2)


@pytest.mark.parametrize("arguments", [[], ["{out}", "fly"]], ids=["no folder", "unknown stage"])
def test_on_gpu_script_explains_itself(tmp_path: Path, arguments: list[str]) -> None:
    command = ["bash", str(ROOT / "benchmarks/on_gpu.sh"), *arguments]
    command = [part.replace("{out}", str(tmp_path)) for part in command]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: benchmarks/on_gpu.sh FOLDER" in done.stderr


def test_on_gpu_script_reports_a_stage_that_fails(tmp_path: Path) -> None:
    """The real script; the interpreter it is given can do nothing."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *summary*) exec {sys.executable} "$@";; esac\nexit 3\n', "utf-8"
    )
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python)}
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks/on_gpu.sh"), str(tmp_path / "out"), "kernels"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "kernels ended with exit code 3" in done.stdout
