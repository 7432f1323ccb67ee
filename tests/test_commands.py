"""The commands as a person meets them: what they print, and what they say to a mistake."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgpt2.__main__ import COMMANDS
from fastgpt2.__main__ import main as console
from fastgpt2.errors import UserError
from fastgpt2.generate import main as generate
from fastgpt2.text import CharTokenizer, save_tokenizer
from fastgpt2.train import main as train
from fastgpt2.training import checkpoint
from fastgpt2.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"the {i} cats and {i * i} dogs sat\n" for i in range(40))
SHAPE = ["--model=gpt2-nano", "--block-size=16", "--n-layer=1", "--n-head=1", "--n-embd=8"]
LENGTH = ["--batch-size=2", "--steps=3", "--warmup-steps=1", "--sample-tokens=5"]
TINY = ["--tokenizer=bytes", "--device=cpu", *SHAPE, *LENGTH]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def finished(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert train(["--data", data, "--out", str(run), *TINY]) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A run folder to spoil."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt2.training.trainer.plot", lambda run: None)


def complaint(
    command: Callable[[list[str]], int], argv: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """The one line that a command says to a mistake."""
    capsys.readouterr()
    try:
        code: object = command(argv)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    name = "train" if command is train else "generate"
    assert lines[0].startswith(f"fastgpt2 {name}: error: ")
    return lines[0].removeprefix(f"fastgpt2 {name}: error: ")


# train, generate, resume


def test_train_generate_resume(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "new" / "run")
    assert train(["--data", data, "--out", out, *TINY, "--sample-prompt", "the "]) == 0
    said = capsys.readouterr().out
    for part in (
        f"run: {out}\n",
        "  n_layer = 1\n",
        "parameters (1 layers, 1 heads, width 8, context 16, vocabulary 257)",
        "memory: about ",
        "kernels: torch (",
        "step 3: validation loss ",
        "  | the ",
        "trained 3 steps, 96 tokens, in ",
        f"generate with: python -m fastgpt2.generate --run {out} --prompt 'the '\n",
    ):
        assert part in said
    assert generate(["--run", out, "--prompt", "the 7", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("the 7")
    assert train(["--out", out, "--resume", "--steps", "5"]) == 0
    said = capsys.readouterr().out
    assert "training: 5 steps (3 done)" in said
    assert "trained 5 steps" in said
    assert checkpoint.latest(Path(out)).name == "step_00000005"
    assert [r["step"] for r in read_metrics(Path(out)) if "train_loss" in r] == [1, 3, 5]


def test_the_same_seed_gives_the_same_text(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--run", str(finished), "--prompt", "a", "--max-new-tokens", "20", "--samples", "2"]
    texts = []
    for seed in ("1", "1", "2"):
        assert generate([*argv, "--seed", seed, "--top-k", "200"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    first, second = texts[0].split("---\n")
    assert first != second
    # the second sample of one seed is the first of the next
    assert second == texts[2].split("---\n")[0]


@pytest.mark.parametrize("flags", [["--greedy"], ["--temperature", "0"], ["--top-k", "1"]])
def test_greedy_in_three_ways(
    finished: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    texts = []
    for _ in range(2):
        generate(["--run", str(finished), "--prompt", "the", "--max-new-tokens", "20", *flags])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_generate_in_half_precision(
    finished: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    assert generate(["--run", str(finished), "--dtype", dtype, "--max-new-tokens", "20"]) == 0


def test_generate_takes_the_checkpoint_asked_for(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(["--out", str(run), "--resume", "--steps", "4"])
    path = checkpoint.latest(run) / checkpoint.STATE
    state = json.loads(path.read_text(encoding="utf-8"))
    state["validation"]["loss"] = 99.0
    path.write_text(json.dumps(state), encoding="utf-8")
    taken = []

    def load_model(folder: Path, **_: object) -> None:
        taken.append(folder.name)
        raise UserError("enough")

    monkeypatch.setattr(checkpoint, "load_model", load_model)
    for flags in ([], ["--checkpoint", "latest"]):
        assert complaint(generate, ["--run", str(run), *flags], capsys) == "enough"
    assert taken == ["step_00000003", "step_00000004"]


def test_without_a_compiler_it_says_so_and_trains(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert train(["--data", data, "--out", str(tmp_path / "run"), *TINY, "--compile"]) == 0
    lines = capsys.readouterr().out.splitlines()
    about = [line for line in lines if line.startswith("compile: ")]
    assert len(about) == 1
    assert about[0].startswith("compile: no C++ compiler found (")
    assert about[0].endswith("; training without it")
    first_step = next(i for i, line in enumerate(lines) if line.startswith("step 3"))
    assert lines.index(about[0]) < first_step


def test_every_run_gets_a_folder_of_its_own(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert train(["--data", data, *TINY, "--steps", "1", "--sample-tokens", "0"]) == 0
    assert len(list(Path("runs").iterdir())) == 3


def test_overwrite_starts_again(run: Path, data: str) -> None:
    (run / "notes.txt").write_text("mine", encoding="utf-8")
    assert train(["--data", data, "--out", str(run), *TINY, "--steps", "2", "--overwrite"]) == 0
    assert checkpoint.saved_steps(run) == [2]
    assert not (run / "notes.txt").exists()


# mistakes


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
        (["--resume", "--out", "nowhere"], "--resume: nowhere is no run folder"),
        (["--resume", "--out", "x", "--config", "cpu"], "with its own configuration"),
        (["--device", "gpu"], "device 'gpu': "),
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
        (b"abc\n" * 50, ["--val-fraction", "0.001"], "validation tokens: too short"),
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
    assert "no run folder, so --overwrite does not delete it" in said
    assert file.read_text(encoding="utf-8") == "mine"
    (tmp_path / "config.toml").write_text("steps = 1", encoding="utf-8")
    said = complaint(train, ["--out", str(tmp_path), "--resume"], capsys)
    assert "has no checkpoint yet; start again with --overwrite" in said


@pytest.mark.parametrize("flag", ["--n-layer", "--seed", "--block-size"])
def test_what_a_resumed_run_cannot_change(
    finished: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    said = complaint(train, ["--out", str(finished), "--resume", flag, "7"], capsys)
    assert "cannot become 7; start a new run for that" in said


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def scribble(path: Path) -> None:
    path.write_bytes(b'{"step": [')


@pytest.mark.parametrize("damage", [cut, scribble, Path.unlink])
@pytest.mark.parametrize(
    "file", [checkpoint.MODEL, checkpoint.CONFIG, checkpoint.STATE, "fastgpt2_tokenizer.json"]
)
def test_damaged_runs(
    run: Path, capsys: pytest.CaptureFixture[str], file: str, damage: Callable[[Path], None]
) -> None:
    path = run / file
    damage(path if path.exists() else checkpoint.latest(run) / file)
    before = contents(run)
    # the one line names the run, at the least
    assert str(run) in complaint(generate, ["--run", str(run)], capsys)
    assert str(run) in complaint(train, ["--out", str(run), "--resume"], capsys)
    assert contents(run) == before


def test_damaged_moments(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(checkpoint.latest(run) / checkpoint.OPTIMIZER)
    assert "optimizer.safetensors" in complaint(train, ["--out", str(run), "--resume"], capsys)


def test_a_tokenizer_of_another_model(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tokenizer(CharTokenizer(sorted(set(TEXT))), run)
    count = len(set(TEXT))
    said = complaint(generate, ["--run", str(run)], capsys)
    assert f"the tokenizer has {count} ids, the model 257" in said
    said = complaint(train, ["--out", str(run), "--resume"], capsys)
    assert "saved with tokenizer bytes " in said
    assert "the run's is char " in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run", "nowhere"], "nowhere: no checkpoint in it"),
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


# the console


def test_the_console_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"]):
        assert console(argv) == 0
        said = capsys.readouterr().out
        assert all(f"\n  {name} " in said for name in COMMANDS)
    assert console(["trian"]) == 2
    assert capsys.readouterr().err.startswith("fastgpt2: error: no command 'trian'")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        console([command, "--help"])
    assert exit.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: fastgpt2 {command}")
    # no default that says nothing, no field without a text
    assert "None" not in said


def run_program(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


def test_as_a_program_of_its_own(tmp_path: Path) -> None:
    """Nothing else on stderr: no warning of a library, no traceback."""
    result = run_program("fastgpt2.train", "--out", "x", "--resume", cwd=tmp_path)
    assert result.returncode == 2
    said = "fastgpt2 train: error: --resume: x is no run folder (it has no config.toml)\n"
    assert (result.stdout, result.stderr) == ("", said)


def test_a_terminal_that_cannot_show_every_character(finished: Path) -> None:
    command = ["fastgpt2", "generate", f"--run={finished}", "--prompt=é", "--max-new-tokens=0"]
    result = run_program(*command, cwd=ROOT, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout, result.stderr) == (0, "\\xe9\n", "")
