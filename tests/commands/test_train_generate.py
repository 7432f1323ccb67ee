"""The commands as a person meets them: what they print and do."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt2 import runs
from fastgpt2.__main__ import COMMANDS
from fastgpt2.__main__ import main as console
from fastgpt2.errors import UserError
from fastgpt2.generate.__main__ import main as generate
from fastgpt2.opener import OpenedModel
from fastgpt2.train.__main__ import main as train
from fastgpt2.train.metrics import read_metrics
from tests.commands.tiny_command import TINY, complaint

ROOT = Path(__file__).parents[2]


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
    assert runs.latest(Path(out)).name == "step_00000005"
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
    path = runs.latest(run) / runs.STATE
    state = json.loads(path.read_text(encoding="utf-8"))
    state["validation"]["loss"] = 99.0
    path.write_text(json.dumps(state), encoding="utf-8")
    taken = []

    def load(opened: OpenedModel, *_: object) -> None:
        taken.append(opened.path.name)
        raise UserError("enough")

    monkeypatch.setattr(OpenedModel, "load", load)
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
    assert runs.saved_steps(run) == [2]
    assert not (run / "notes.txt").exists()


def test_the_console_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"]):
        assert console(argv) == 0
        said = capsys.readouterr().out
        assert all(f"\n  {name} " in said for name in COMMANDS)
    assert console(["trian"]) == 2
    said = capsys.readouterr().err
    assert said == f"fastgpt2 trian: error: no such command; there are {', '.join(COMMANDS)}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        console([command, "--help"])
    assert exit.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: fastgpt2 {command}")
    # no default that says nothing, no field without a text
    assert "None" not in said


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 2), (errno.EPIPE, 141)])
def test_a_help_that_nobody_can_read(
    command: str,
    number: int,
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "stdout", Broken())
        console([command, "--help"])
    assert exit.value.code == code
    said = capsys.readouterr().err
    line = f"fastgpt2 {command}: error: No space left on device\n"
    assert said == (line if code == 2 else "")


def run_program(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def test_as_a_program_of_its_own(tmp_path: Path) -> None:
    """Nothing else on stderr: no warning of a library, no traceback."""
    result = run_program("fastgpt2.train", "--out", "x", "--resume", cwd=tmp_path)
    assert result.returncode == 2
    said = "fastgpt2 train: error: --resume: x is not a run folder (it has no config.toml)\n"
    assert (result.stdout, result.stderr) == ("", said)


def test_a_terminal_that_cannot_show_every_character(finished: Path) -> None:
    command = ["fastgpt2", "generate", f"--run={finished}", "--prompt=é", "--max-new-tokens=0"]
    result = run_program(*command, cwd=ROOT, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout, result.stderr) == (0, "\\xe9\n", "")
