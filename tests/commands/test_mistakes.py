"""Every mistake is one line, exit code 2, and nothing is harmed."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgpt2 import runs
from fastgpt2.generate.__main__ import main as generate
from fastgpt2.text import CharTokenizer, save_tokenizer
from fastgpt2.train.__main__ import main as train
from tests.commands.tiny_command import TEXT, TINY, complaint


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "not empty; give --resume or --overwrite"),
        (["--overwrite", "--data", "missing.txt"], "missing.txt"),
        (["--overwrite", "--n-head", "3"], "n_embd must be a multiple of n_head, got 8 and 3"),
        (["--overwrite", "--impl", "triton"], "impl='triton' cannot run"),
        (["--overwrite", "--device", "cuda:99"], "device 'cuda:99'"),
        (["--overwrite", "--resume"], "--resume and --overwrite exclude each other"),
    ],
)
def test_a_run_is_untouched_when_the_next_one_fails_its_checks(
    finished: Path,
    data: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("fastgpt2.kernels.backend.INTERPRETED", False)
    before = contents(finished)
    argv = ["--data", data, "--out", str(finished), *TINY, *flags]
    assert message in complaint(train, argv, capsys)
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bogus", "1"], "unrecognized arguments: --bogus 1"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--model", "gpt3"], "argument --model: invalid choice: 'gpt3'"),
        (["--steps", "0"], "config: steps must be greater than 0, got 0"),
        (["--lr", "nan"], "config: lr must be 0 or more, got nan"),
        (["--epochs", "inf"], "config: epochs must be finite, got inf"),
        (["--config", "cpux"], "config 'cpux': no such file, and none of cpu, cuda"),
        (["--resume"], "--resume continues the run given by --out"),
        (["--resume", "--out", "nowhere"], "--resume: nowhere is not a run folder"),
        (["--resume", "--out", "x", "--config", "cpu"], "with its own configuration"),
        (["--device", "gpu"], "device 'gpu': "),
        (["--fp8"], "fp8 wants n_embd to be a multiple of 16, got 8"),
        (
            ["--fp8", "--n-embd=16", "--dtype=fp16"],
            "--fp8: activations must be in bf16 or fp32, not float16",
        ),
    ],
)
def test_mistakes_on_the_command_line(
    data: str, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in complaint(train, ["--data", data, *TINY, *argv], capsys)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (b"warmup_step = 1", "unknown key 'warmup_step'; did you mean 'warmup_steps'?"),
        (b"lr = 'x'", "lr must be a number, got 'x'"),
        (b"\xff", "not UTF-8 text"),
        (b"lr == 1", "not valid TOML"),
    ],
)
def test_mistakes_in_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], toml: bytes, message: str
) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(toml)
    assert f"{path}: {message}" in complaint(train, ["--config", str(path)], capsys)


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], "corpus.txt"),
        (b"", [], "empty"),
        (b"too short", [], "too short"),
        (b"caf\xe9 " * 50, [], "UTF-8"),
        (b"one line " * 50, ["--tokenizer", "char"], "sample_prompt: tokenizer char"),
        (
            b"abc\n" * 50,
            ["--tokenizer", "char", "--val-fraction", "0.001"],
            "validation tokens: too short",
        ),
    ],
)
def test_mistakes_in_the_data(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    flags: list[str],
    message: str,
) -> None:
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    argv = ["--data", str(path), "--out", str(tmp_path / "run"), *TINY, *flags]
    assert message in complaint(train, argv, capsys)
    assert not (tmp_path / "run").exists()


def test_mistakes_about_the_folder(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    argv = ["--data", data, *TINY]
    assert "is a file" in complaint(train, [*argv, "--out", str(file)], capsys)
    said = complaint(train, [*argv, "--out", str(tmp_path), "--overwrite"], capsys)
    assert "not a run folder, so --overwrite does not delete it" in said
    assert file.read_text(encoding="utf-8") == "mine"
    (tmp_path / "config.toml").write_text("steps = 1", encoding="utf-8")
    said = complaint(train, ["--out", str(tmp_path), "--resume"], capsys)
    assert "has no checkpoint yet; start again with --overwrite" in said


@pytest.mark.parametrize("flag", ["--n-layer=7", "--seed=7", "--no-bias", "--stride=7"])
def test_what_a_resumed_run_cannot_change(
    finished: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    said = complaint(train, ["--out", str(finished), "--resume", flag], capsys)
    assert said.endswith("; start a new run for that")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def scribble(path: Path) -> None:
    path.write_bytes(b'{"step": [')


@pytest.mark.parametrize("damage", [cut, scribble, Path.unlink])
@pytest.mark.parametrize(
    "file", [runs.MODEL, runs.MODEL_CONFIG, runs.STATE, "fastgpt2_tokenizer.json"]
)
def test_damaged_runs(
    run: Path, capsys: pytest.CaptureFixture[str], file: str, damage: Callable[[Path], None]
) -> None:
    path = run / file
    damage(path if path.exists() else runs.latest(run) / file)
    before = contents(run)
    # the one line names the run, at the least
    assert str(run) in complaint(generate, ["--run", str(run)], capsys)
    assert str(run) in complaint(train, ["--out", str(run), "--resume"], capsys)
    assert contents(run) == before


def test_damaged_moments(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(runs.latest(run) / runs.OPTIMIZER)
    assert "optimizer.safetensors" in complaint(train, ["--out", str(run), "--resume"], capsys)


def test_a_tokenizer_of_another_model(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tokenizer(CharTokenizer(sorted(set(TEXT))), run)
    count = len(set(TEXT))
    said = complaint(generate, ["--run", str(run)], capsys)
    assert f"the tokenizer char has {count} ids, the model 257" in said
    said = complaint(train, ["--out", str(run), "--resume"], capsys)
    assert "saved with tokenizer bytes " in said
    assert "the run's is char " in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run", "nowhere"], "nowhere: no such file or folder, and not one of gpt2"),
        (["--top-k", "0"], "--top-k must be a number from 1 to 2^62, got 0"),
        (["--temperature", "-1"], "--temperature must be a number from 0 to 2^62, got -1.0"),
        (["--temperature", "nan"], "--temperature must be a number from 0 to 2^62, got nan"),
        (["--max-new-tokens", "-1"], "--max-new-tokens must be a number from 0"),
        (["--samples", "0"], "--samples must be a number from 1"),
        (["--seed", str(2**64)], "--seed must be a number from 0"),
        (["--prompt", "caf\udce9"], "--prompt is not UTF-8 text"),
        (["--impl", "triton"], "impl='triton' cannot run"),
        (["--device", "cuda:99"], "device 'cuda:99'"),
        (["--checkpoint", "first"], "argument --checkpoint: invalid choice"),
    ],
)
def test_mistakes_of_generate(
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("fastgpt2.kernels.backend.INTERPRETED", False)
    assert message in complaint(generate, ["--run", str(finished), *flags], capsys)


def test_a_prompt_outside_the_vocabulary(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert train(["--data", data, "--out", out, *TINY, "--tokenizer", "char", "--steps", "1"]) == 0
    said = complaint(generate, ["--run", out, "--prompt", "the é"], capsys)
    assert said.startswith("prompt: tokenizer char: 'é' (U+00E9) at position 4 is not among")
    assert "prompt: must not be empty" in complaint(
        generate, ["--run", out, "--prompt", ""], capsys
    )
