"""Every benchmark once, tiny; and what the GPU's one command makes of them."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import report, summary
from benchmarks.bench_train_step import peak_memory, workloads
from benchmarks.harness import Scale
from benchmarks.ops import op_cases
from benchmarks.results import Entry, Run
from tests.benchmarks.dry import ROOT, bench, on_gpu, quick_python
from tools import exercise

# in no stage of on_gpu.sh
NOT_ON_GPU = ("bench_growth.py", "bench_load.py", "bench_data.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a dry run of two stages leaves, and one of the whole suite."""
    out = tmp_path_factory.mktemp("gpu")
    python = quick_python(tmp_path_factory.mktemp("python"))
    done = on_gpu(out, "decode", "tune", PYTHON=python)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "decode fp32" in done.stdout and "tuning, fastest" in done.stdout
    # generation has been run by the script
    without = ("--ignore", "benchmarks/bench_generate.py")
    whole = bench("benchmarks", *without, "--benchmark-json", str(out / "kernels.json"))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    return out


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """All of it."""
    return Run.of([folder / "kernels.json", folder / "decode.json"])


def test_every_op_is_timed_in_every_mode(run: Run) -> None:
    seen = {(e.facts.get("op"), e.mode, e.facts.get("provider")) for e in run.entries}
    for case in op_cases(Scale.DRY):
        for mode in case.modes:
            for provider in ("triton", "torch", "torch-compiled", "eager", "compile"):
                assert (case.op, mode, provider) in seen


def contenders(run: Run, word: str) -> set[str]:
    return {e.contender for e in run.entries if e.group.startswith(word)}


def test_every_other_race_is_run(run: Run) -> None:
    both = {"fastgpt2", "fastgpt2 compiled", "nanogpt", "nanogpt compiled", "plain compiled"}
    assert contenders(run, "train step") >= both
    assert "fastgpt2" in contenders(run, "prefill") & contenders(run, "decode fp32")
    assert contenders(run, "growth with B") == {"fastgpt2", "nanogpt"}
    assert contenders(run, "load weights") >= {"hf", "nanogpt", "llmc", "openai", "fastgpt2"}
    assert contenders(run, "import") >= {"torch", "fastgpt2"}
    assert contenders(run, "loader") >= {"blocks", "shards", "sliding window"}
    assert contenders(run, "prepare")


def test_no_benchmark_file_is_forgotten_on_a_gpu() -> None:
    script = (ROOT / "benchmarks" / "on_gpu.sh").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks").glob("bench_*.py"):
        assert path.name in NOT_ON_GPU or path.name.removeprefix("bench") in script, path.name


def test_the_json_says_what_was_measured(folder: Path, run: Run) -> None:
    record = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))
    for key in ("device", "cpu_model", "torch", "triton", "commit", "nvidia_smi"):
        assert key in record["machine_info"]
    assert record["ceilings"]["bytes_per_s"] > 0 < record["ceilings"]["flop_per_s"]["bf16"]
    attention = next(e for e in run.entries if e.contender == "triton forward")
    for key in ("bytes", "flops", "GB_per_s", "TFLOP_per_s", "roofline"):
        assert attention.facts[key] > 0
    stats = record["benchmarks"][0]["stats"]
    # a sample that the tape would not have played as it was taken
    assert stats["data"][0] == pytest.approx(record["benchmarks"][0]["extra_info"]["p20"])


def test_every_kernel_is_tuned_and_right(folder: Path) -> None:
    from fastgpt2.kernels.tuning import TABLE, read_table

    trials = json.loads((folder / "tune.json").read_text(encoding="utf-8"))["trials"]
    assert {trial["kernel"] for trial in trials} == set(TABLE)
    assert not [trial for trial in trials if trial["fault"]]
    # the table that is left is one that the kernels can run by
    assert set(read_table((folder / "tuning.json").read_text(encoding="utf-8"))) == set(TABLE)


def test_summary_names_every_stage(folder: Path) -> None:
    (folder / "correct.jsonl").write_text(
        '{"test": "a::b", "outcome": "failed"}\n{"test": "a::c", "outcome": "passed"}\n{"test": "a',
        encoding="utf-8",
    )
    text = summary.summary(folder)
    for line in (
        "correct: 2 tests, 1 failed, 1 passed",
        "FAILED a::b",
        "attention dry",
        "train step",
        "decode fp32",
        "tuning, fastest",
    ):
        assert line in text


def test_a_report_of_all_of_it(folder: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    last = f"before\n{report.BEGIN}\nlast table\n{report.END}\nafter\n"
    readme.write_text(last, encoding="utf-8")
    files = [str(folder / "kernels.json"), str(folder / "decode.json")]
    results = tmp_path / "results"
    options = ["--results", str(results), "--readme", str(readme)]
    assert report.main([*files, *options]) == 0
    (page,) = results.glob("*.md")
    text = page.read_text(encoding="utf-8")
    pictures = sorted(results.glob("*.png"))
    assert [p.stem.rpartition("_")[2] for p in pictures] == [
        *("generate", "growth", "ops", "roofline", "train"),
    ]
    for word in (*(p.name for p in pictures), "## train step", "more than `import torch`"):
        assert word in text
    table = readme.read_text(encoding="utf-8")
    assert table.startswith("before\n") and table.endswith("after\n") and "last table" not in table
    assert "| train step" in table and f"results/{page.name}" in table


def test_every_kernel_is_exercised(capsys: pytest.CaptureFixture[str]) -> None:
    assert exercise.main() == 0
    assert len(capsys.readouterr().out.splitlines()) >= len(op_cases(Scale.DRY))


def test_peak_memory_is_a_process_of_its_own() -> None:
    (workload,) = workloads(Scale.DRY)
    # an interpreter with torch in it, in bytes
    assert 10**8 < peak_memory(workload, "fastgpt2", Scale.DRY) < 10**10


def test_on_gpu_script_explains_itself(tmp_path: Path) -> None:
    done = on_gpu(tmp_path, "fly")
    assert done.returncode == 2
    assert "usage: benchmarks/on_gpu.sh FOLDER" in done.stderr


def test_on_gpu_script_reports_a_stage_that_fails(tmp_path: Path) -> None:
    """The real script; the interpreter it is given can do nothing."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n", "utf-8")
    python.chmod(0o755)
    done = on_gpu(tmp_path / "out", "kernels", PYTHON=str(python))
    assert done.returncode == 1
    assert "kernels ended with exit code 3" in done.stdout


def test_benchmarks_are_not_collected_by_default() -> None:
    import tomllib

    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert options["tool"]["pytest"]["ini_options"]["testpaths"] == ["tests"]


def test_entries_know_ours(run: Run) -> None:
    def is_ours(e: Entry) -> bool:
        return e.contender.split()[0] not in ("eager", "compile", "nanogpt", "transformers")

    ops = [e for e in run.entries if "op" in e.facts or e.group.startswith("train step")]
    assert all(e.ours == (is_ours(e) and "plain" not in e.contender) for e in ops)
    assert torch.tensor([e.rounds for e in run.entries]).min() >= 1
