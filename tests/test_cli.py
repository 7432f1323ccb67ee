import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt2.__main__ import main as console
from fastgpt2.cli import Parser, run
from fastgpt2.errors import UserError


def fail(error: BaseException) -> None:
    raise error


def test_success_is_zero_or_the_bodys_own_code() -> None:
    assert run("x", lambda: None) == 0
    assert run("x", lambda: 3) == 3


def test_user_error_is_one_line_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prepare", lambda: fail(UserError("FILE: bad\nbadly"))) == 2
    assert capsys.readouterr().err == "fastgpt2 prepare: error: FILE: bad badly\n"


def test_wrong_flag_is_one_line_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="fastgpt2 train")
    parser.add_argument("--steps", type=int)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--steps", "many"])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("fastgpt2 train: error: argument --steps: invalid int value: 'many'")
    assert err.count("\n") == 1


def test_a_very_long_value_does_not_fill_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    digits = "9" * 5_000
    parser = Parser(prog="fastgpt2 train")
    parser.add_argument("--steps", type=int)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--steps={digits}"])
    err = capsys.readouterr().err
    assert err.startswith("fastgpt2 train: error: argument --steps: invalid int value: '999")
    assert err.endswith("99' (--help shows all flags)\n") and len(err) < 2_100
    assert run("train", lambda: fail(UserError(f"--n: must be below 8, got {digits}"))) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith("fastgpt2 train: error: --n: must be below 8, got 99") and len(err) < 2_100
    )


def test_interrupt_is_one_line_and_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", lambda: fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.strip() == "fastgpt2 train: interrupted"


def test_our_own_faults_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run("train", lambda: fail(ZeroDivisionError()))


def test_closed_pipe_is_quiet() -> None:
    code = (
        "import sys; from fastgpt2.cli import run\n"
        "sys.exit(run('generate', lambda: [print('x' * 9999) for _ in range(99)] and None))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(30) == 141
        assert process.stderr.read() == b""


@pytest.mark.skipif(os.name == "nt", reason="a folder in use cannot be deleted")
def test_a_working_folder_that_was_deleted_is_one_line(tmp_path: Path) -> None:
    code = "import os, sys; os.rmdir(os.getcwd()); from fastgpt2.cli import run; "
    code += "sys.exit(run('x', lambda: print('never')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert done.returncode == 2 and not done.stdout
    said = b"fastgpt2 x: error: the working folder has been deleted; cd to another one\n"
    assert done.stderr == said


HELP = "from fastgpt2.cli import Parser; Parser(prog='fastgpt2 x').parse_args(['--help'])"


@pytest.mark.parametrize(
    "code", [HELP, "from fastgpt2.__main__ import main; raise SystemExit(main([]))"]
)
def test_help_may_find_a_full_disk_or_no_reader(code: str) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.endswith(b": error: No space left on device\n")
    assert done.stderr.count(b"\n") == 1
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_command_may_be_interrupted_while_it_is_imported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgpt2.__main__._module", lambda _: fail(KeyboardInterrupt()))
    assert console(["train"]) == 130
    assert capsys.readouterr().err == "\nfastgpt2 train: interrupted\n"
