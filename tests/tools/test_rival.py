"""A rival's kernel file, given by path, gets its row of the kernel report."""

import subprocess
from pathlib import Path

import pytest

from tests.compiling import run_compiling
from tools import rival

RIVAL = """
import triton
import triton.language as tl

@triton.autotune([triton.Config({}, num_warps=4)], key=[])
@triton.jit
def _scale_kernel(x_ptr, y_ptr, factor, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs) * factor)
"""
ARGUMENTS = ("x_ptr=*fp32", "y_ptr=*fp32", "factor=fp32", "BLOCK=:1024")


@pytest.fixture
def rival_file(tmp_path: Path) -> Path:
    file = tmp_path / "rival_kernels.py"
    file.write_text(RIVAL, encoding="utf-8")
    return file


def _run(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run_compiling("-m", "tools.rival", str(file), *options)


def test_a_rival_s_binary_has_the_same_row(rival_file: Path) -> None:
    given = [part for text in ARGUMENTS for part in ("--argument", text)]
    done = _run(rival_file, "--kernel", "_scale_kernel", *given, "--turn", "1024")
    assert done.returncode == 0, done.stderr
    head, _, row = done.stdout.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == len(head.strip("|").split("|"))
    assert cells[:3] == ["_scale_kernel", "w4 s3", "sm_90"]
    # 8 elements a thread: two loads and two stores of 16 bytes, eight products
    count, split = cells[10].split(" per "), cells[11].split()
    assert count[1] == "element" and 2 < float(count[0]) < 6
    assert float(split[1]) == 1.0 and float(split[4]) >= 0.5


MISTAKES = {
    ("--kernel", "nothing"): "has no Triton kernel 'nothing'",
    ("--kernel", "_scale_kernel", "--argument", "z=i32"): "must be NAME=TYPE or NAME=:VALUE",
    ("--kernel", "_scale_kernel", "--argument", "BLOCK=:1 +"): "is not a Python value",
}


def test_mistakes_before_a_binary_is_made_are_one_line(rival_file: Path) -> None:
    # one process for all: to start it takes seconds
    calls = [[str(rival_file), *options] for options in MISTAKES]
    code = f"from tools import rival\nfor call in {calls!r}: print(rival.main(call))"
    done = run_compiling("-c", code)
    assert done.stdout.split() == ["2"] * len(MISTAKES), done.stderr
    for line, message in zip(done.stderr.splitlines(), MISTAKES.values(), strict=True):
        assert message in line


def test_a_file_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rival.main([str(tmp_path / "none.py"), "--kernel", "k"]) == 2
    assert "not a Python file" in capsys.readouterr().err
