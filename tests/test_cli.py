import subprocess
import sys

import pytest

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
