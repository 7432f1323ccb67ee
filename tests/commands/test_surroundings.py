"""A hostile machine: no compiler that works, no memory, no streams, no home, a folder in use."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._inductor import config as inductor

from fastgpt2 import cli, runs
from fastgpt2.text import build_dataset
from fastgpt2.train.__main__ import main as train
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.config_file import read_config
from fastgpt2.train.metrics import plot, read_metrics
from tests.commands.tiny_command import TEXT, TINY, complaint
from tests.text.tiny import tiny_files


def overflow() -> None:
    torch.empty(2**62, 2**62)


def too_large_an_array() -> None:
    np.empty((2**62, 8), np.int64)


def too_long_an_array() -> None:
    np.arange(0, 2**62, dtype=np.int64)


def too_large() -> None:
    torch.empty(2**50)


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/file")


def no_files() -> None:
    # as gloo says it
    raise RuntimeError("[enforce fail at loop.cc:48] rv != -1. pipe: Too many open files")


def no_memory() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (overflow, "out of memory: "),
        (too_large, "out of memory: "),
        (too_large_an_array, "out of memory: "),
        (too_long_an_array, "out of memory: "),
        (no_memory, "out of memory: an allocation failed"),
        (no_files, "Too many open files: see ulimit -n"),
        (full_disk, "a/file: No space left on device"),
    ],
)
def test_what_the_surroundings_cause_is_one_line_and_2(
    capsys: pytest.CaptureFixture[str], body: Callable[[], None], message: str
) -> None:
    assert cli.run("train", body) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastgpt2 train: error: {message}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("closed", ["2>&-", "0<&- 1>&- 2>&-", ">/dev/full 2>/dev/full"])
def test_training_without_streams_and_without_a_home(
    data: str, tmp_path: Path, closed: str
) -> None:
    if os.name == "nt":
        pytest.skip("needs a POSIX shell")
    names = ("PATH", "TIKTOKEN_CACHE_DIR", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    environment |= {"PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path)}
    command = [sys.executable, "-m", "fastgpt2.train", "--data", data, "--out", "run", *TINY]
    result = subprocess.run(
        ["/bin/sh", "-c", f'"$@" {closed}', "sh", *command],
        cwd=tmp_path,
        env=environment,
        timeout=240,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert runs.latest(tmp_path / "run").name == "step_00000003"


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    code = "import sys; from fastgpt2.cli import run; sys.exit(run('x', lambda: print('text')))"
    with open("/dev/full", "w", encoding="utf-8") as full:
        result = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, timeout=240
        )
    assert result.returncode == 2
    assert result.stderr == b"fastgpt2 x: error: No space left on device\n"


def test_a_compiler_that_fails_is_one_line(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "g++"
    fake.write_text("#!/bin/sh\necho no headers >&2\nexit 1\n", encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    # monkeypatch would take this setting for a class's and delete it at the end
    compiler = inductor.patch({"cpp.cxx": (None, str(fake))})
    weights = []
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        out = tmp_path / name
        with compiler:
            assert train(["--data", data, "--out", str(out), *TINY, "--dropout=0.1", *flags]) == 0
        weights.append((runs.latest(out) / runs.MODEL).read_bytes())
    said = [x for x in capsys.readouterr().out.splitlines() if "compile: failed" in x]
    assert len(said) == 1
    assert said[0].endswith("); training without it")
    # the attempt has left nothing behind
    assert weights[0] == weights[1]


def test_a_folder_in_use_is_refused(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--data", data, "--out", str(tmp_path / "run"), *TINY]
    said: list[str] = []

    def build(*arguments: Any, **options: Any) -> Any:
        # in the middle of the first run's start, a second one comes
        monkeypatch.undo()
        said.append(complaint(train, argv, capsys))
        return build_dataset(*arguments, **options)

    monkeypatch.setattr("fastgpt2.train.trainer.build_dataset", build)
    assert train(argv) == 0
    assert said == [f"{tmp_path / 'run'}: another process is training into it"]


def test_several_processes_cannot_share_a_gpu(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    argv = ["--data", data, "--out", str(tmp_path / "run"), *TINY, "--device=cuda:0"]
    assert "each process takes a GPU of its own" in complaint(train, argv, capsys)
    # it is said once
    monkeypatch.setenv("RANK", "1")
    assert train(argv) == 2
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "run").exists()


def test_overwriting_keeps_what_the_run_is_made_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    run = tmp_path / "run"
    assert train(["--data", str(tmp_path / "text.txt"), "--out", str(run), *TINY]) == 0
    monkeypatch.chdir(run)
    assert train(["--data", "../text.txt", "--out", ".", "--overwrite", *TINY]) == 0
    (run / "mine.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "link.txt").symlink_to(run / "mine.txt")
    refused = dict.fromkeys(("mine.txt", str(tmp_path / "link.txt"), "."), "which would be emptied")
    # a pattern does not match what lies in a run
    refused[str(run / "*.txt")] = "has no files (those of runs are left out)"
    for item, message in refused.items():
        argv = ["--data", item, "--out", str(run), "--overwrite", *TINY]
        assert message in complaint(train, argv, capsys)
    assert (run / "mine.txt").read_text(encoding="utf-8") == TEXT
    assert runs.latest(run).name == "step_00000003"


def test_a_run_below_its_corpus_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert train(["--data", ".", "--out", "runs/a", *TINY]) == 0
    assert train(["--out", "runs/a", "--resume", "--steps", "4"]) == 0
    # what a run has written is no data of the next one
    assert train(["--data", ".", "--out", "runs/a", "--overwrite", *TINY]) == 0
    assert train(["--data", "**/*", "--out", "runs/b", *TINY]) == 0
    ours, theirs = (runs.step_folder(Path("runs") / name, 3) for name in "ab")
    assert (ours / runs.MODEL).exists() and (theirs / runs.MODEL).exists()
    assert (ours / runs.MODEL).read_bytes() == (theirs / runs.MODEL).read_bytes()


def learning_rates(run: Path) -> list[float]:
    return [record["lr"] for record in read_metrics(run) if "lr" in record]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_small_learning_rate_falls_too(data: str, tmp_path: Path, schedule: str) -> None:
    """The configuration's min_lr is a share of its lr."""
    argv = ["--data", data, "--out", str(tmp_path / "run"), *TINY, "--schedule", schedule]
    argv += ["--config", "cpu", "--optimizer", "adamw"]
    assert train([*argv, "--lr", "1e-5", "--log-every=1"]) == 0
    config = TrainConfig.from_layers(read_config(str(tmp_path / "run" / "config.toml")))
    assert config.final_lr == pytest.approx(1e-5 / 20)
    assert max(learning_rates(tmp_path / "run")) <= 1e-5


def test_a_final_learning_rate_above_the_peak_is_refused(
    data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = complaint(train, ["--data", data, *TINY, "--lr=1e-5", "--min-lr=1e-4"], capsys)
    assert "min_lr must be from 0 to lr (1e-05), got 0.0001" in said
    assert TrainConfig(steps=1, lr=1e-5).final_lr == pytest.approx(1e-6)


def test_tokens_and_epochs_are_counted_by_position(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    epochs = ["--steps=500", "--epochs=1", "--log-every=1"]
    assert train(["--data", data, "--out", out, *TINY, *epochs]) == 0
    capsys.readouterr()
    blocks = read_metrics(tmp_path / "run")[-1]["tokens"] // 16
    assert train(["--out", out, "--resume", "--epochs=2", "--batch-size=4", "--grad-accum=2"]) == 0
    state = runs.read_state(runs.latest(tmp_path / "run"))
    # two epochs of blocks, rounded up to steps of eight
    assert state["loader"]["position"] == blocks + -(-blocks // 8) * 8
    assert read_metrics(tmp_path / "run")[-1]["tokens"] == 16 * state["loader"]["position"]


def test_overwriting_keeps_the_vocabulary_and_the_configuration(
    data: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run with GPT-2's tokenizer is a vocabulary folder itself."""
    for name, text in zip(("encoder.json", "vocab.bpe"), tiny_files(), strict=True):
        (run / name).write_text(text, encoding="utf-8")
    shutil.copy(run / "config.toml", run / "mine.toml")
    argv = ["--data", data, "--out", str(run), "--overwrite", *TINY]
    for flag, what in (("--vocab-dir", "vocabulary"), ("--config", "configuration")):
        path = run if flag == "--vocab-dir" else run / "mine.toml"
        said = complaint(train, [*argv, flag, str(path)], capsys)
        assert said == f"--overwrite: {what} {path} is in {run}, which would be emptied"
    assert (run / "encoder.json").exists() and runs.saved_steps(run) == [3]


def test_a_picture_that_cannot_be_drawn_breaks_no_run(
    data: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgpt2.train.trainer.plot", plot)
    (run / "loss.png").unlink(missing_ok=True)
    (run / "loss.png").mkdir()
    assert train(["--out", str(run), "--resume", "--steps=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith("loss.png: not drawn (")]
    assert len(said) == 1 and "curves: " not in lines[-2]
    assert runs.latest(run).name == "step_00000004"
    # nothing half drawn
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_a_vocabulary_is_found_again_from_another_folder(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vocab").mkdir()
    for name, text in zip(("encoder.json", "vocab.bpe"), tiny_files(), strict=True):
        (tmp_path / "vocab" / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    argv = ["--data", data, "--out", "run", *TINY, "--tokenizer=gpt2", "--vocab-dir=vocab"]
    assert train(argv) == 0
    stored = read_config(str(tmp_path / "run" / "config.toml"))["vocab_dir"]
    assert stored == str(tmp_path / "vocab")
    monkeypatch.chdir("/")
    assert train(["--out", str(tmp_path / "run"), "--resume", "--steps=4"]) == 0
