"""The command that tests every supported pair of PyTorch and Triton, with nothing installed."""

import subprocess
import venv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastgpt2.kernels.report import REPORT
from tools import versions
from tools.versions import Pair

LINES = "# why\nnumpy==2.4.6\ntorch==2.13.0\ntqdm==4.70.1\ntriton==3.7.1\n"


def test_constraints_are_those_of_the_tests_but_for_the_pair() -> None:
    lines = versions.constraints(Pair("2.14.1", "3.9.0"), LINES).splitlines()
    assert lines == ["# why", "numpy==2.4.6", "tqdm==4.70.1", "torch==2.14.1"]
    # the interpreter of Triton 3.6 cannot take numpy 2.4
    old = versions.constraints(Pair("2.11.0", "3.6.0"), LINES)
    assert "numpy<2.4" in old.splitlines()


def test_every_supported_release_is_in_a_pair() -> None:
    torches, tritons = (
        {v.rsplit(".", 1)[0] for v in column} for column in zip(*versions.PAIRS, strict=True)
    )
    assert torches == {"2.11", "2.12", "2.13", "2.14"}
    assert tritons == {"3.6", "3.7", "3.8", "3.9"}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have been run; the compile matrix fails."""
    run: list[list[str]] = []

    def record(command: list[str], **options: Any) -> Any:
        run.append(command)
        return SimpleNamespace(returncode=3 if "fastgpt2.kernels.report" in command else 0)

    monkeypatch.setattr(subprocess, "run", record)
    monkeypatch.setattr(venv, "create", lambda *arguments, **options: None)
    return run


def test_a_new_triton_gets_an_expectation(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "expectation_file", lambda triton: tmp_path / triton)
    (tmp_path / "3.7.1").touch()
    for triton, mode in (("3.7.1", "--check"), ("3.9.0", "--update")):
        commands.clear()
        versions.run_pair(Pair("2.13.0", triton), tmp_path, 2)
        install, own_triton, tests, matrix = commands
        assert "torch==2.13.0" in install
        assert {"--no-deps", f"triton=={triton}"} <= set(own_triton)
        assert tests[-1] == "tests/kernels"
        assert matrix[-1] == mode


def test_a_fault_is_one_line_with_its_log(
    commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = REPORT.read_bytes()
    assert versions.main([str(tmp_path), "--pair", "2.13.0,3.9.0"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("torch-2.13.0-triton-3.9.0: matrix ended with exit code 3, see ")
    assert Path(last.rpartition(" ")[2]).exists()
    assert REPORT.read_bytes() == report


def test_a_pair_that_is_none_is_the_users_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert versions.main([str(tmp_path), "--pair", "latest"]) == 2
    assert "expected TORCH,TRITON" in capsys.readouterr().err
