"""The compile matrix: the kernels as committed are as expected, and planted faults are found."""

import json
import os
import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from fastgpt2.errors import UserError
from fastgpt2.kernels import report
from fastgpt2.kernels.cases import Work
from fastgpt2.kernels.gpus import ARCHITECTURES, GPUS, occupancy
from fastgpt2.kernels.machine_code import SPLIT
from fastgpt2.kernels.report_rows import (
    Row,
    arch_of,
    expectation,
    overview,
    render,
    violations,
)
from tests.compiling import run_compiling

# compiling is not possible where triton has been imported for interpreting
PLANTED = """
import dataclasses, json
from fastgpt2.errors import UserError
from fastgpt2.kernels import report
if __name__ == "__main__":
    rows = report.measure(
        report.tasks_of(["tests.kernels.planted_kernels"], ["sm_80", "sm_90", "gfx942"]), 1
    )
    print(json.dumps([dataclasses.asdict(row) for row in rows]))
"""


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command runs in here, as if the kernels were compiled, which no test process can do."""
    # imported without the interpreter, they would be lost to the tests that follow
    monkeypatch.setattr(report, "kernel_modules", list)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Row]:
    """The planted kernels' rows by configuration and architecture, compiled afresh."""
    folder = tmp_path_factory.mktemp("planted")
    script = folder / "planted.py"
    script.write_text(PLANTED, encoding="utf-8")
    done = run_compiling(str(script), XDG_CACHE_HOME=str(folder), PYTHONPATH=os.getcwd())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rows = [Row(**fields | {"work": Work(**fields["work"])}) for fields in found]
    assert len(list((folder / "fastgpt2" / "kernels").iterdir())) == len(rows)
    return {(row.config, row.arch): row for row in rows}


def _good(row: Row) -> dict[str, dict[str, Any]]:
    """What would have been expected of the row before the fault was planted."""
    mma = {"sm_80": "mma.sync", "sm_90": "wgmma", "gfx942": "mfma"}[row.arch]
    good = {"mma": mma, "spill_bytes": 0, "serialized": False, "instructions": row.instructions}
    return {row.key: good}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_a_good_binary_passes(planted: dict[tuple[str, str], Row], arch: str) -> None:
    row = planted["good", arch]
    assert violations([row], _good(row)) == []
    assert row.registers > 16
    assert row.shared_bytes >= 2 * 64 * 64 * 2


@pytest.mark.parametrize(
    ("config", "arch", "complaint"),
    [
        ("spilling", "sm_90", "spills"),
        ("spilling", "sm_90", "serialises its wgmma"),
        ("oversized", "sm_80", "bytes of shared memory, limit 101376"),
        ("oversized", "sm_90", "bytes of shared memory, limit 232448"),
        ("oversized", "gfx942", "bytes of shared memory, limit 65536"),
        ("narrow", "sm_90", "uses mma.sync, not wgmma"),
    ],
)
def test_faults_planted_in_binaries_are_found(
    planted: dict[tuple[str, str], Row], config: str, arch: str, complaint: str
) -> None:
    row = planted[config, arch]
    assert any(complaint in line for line in violations([row], _good(row)))


def test_a_binarys_loop_that_grows_is_found(planted: dict[tuple[str, str], Row]) -> None:
    """A planted product has 5 % more instructions than the expectation allows, or just not."""
    row = planted["good", "sm_90"]
    assert row.instructions > 50
    for grown, complains in ((1.04, False), (1.06, True)):
        before = _good(row)
        before[row.key]["instructions"] = row.instructions / grown
        found = violations([row], before)
        assert any("instructions per tile" in line for line in found) == complains


def test_a_binarys_loop_is_found_and_split(planted: dict[tuple[str, str], Row]) -> None:
    row = planted["good", "sm_90"]
    # one 64 x 64 x 64 product of a warp group: four wgmma of 16 in K
    assert row.units["tensor"] == 4
    assert row.units["memory"] > 0 and row.units["barrier"] > 0 and row.units["mufu"] == 0
    assert sum(row.units.values()) == row.instructions
    assert set(row.units) == set(SPLIT)


def test_blocks_that_do_not_fit_are_found() -> None:
    row = Row("k", "64 w4", "sm_90", 4, False, 0.0, 1.0, registers=72, per_sm=8)
    assert row.resident == 7
    (line,) = violations([row], expectation([row]))
    assert "launches 8 blocks per multiprocessor, 7 fit" in line
    assert not violations([replace(row, registers=64)], expectation([row]))


def test_new_gone_and_broken_kernels_are_found() -> None:
    row = Row("k", "64 w4", "sm_90", 4, False, 0.0, 1.0, registers=32)
    assert violations([row], expectation([row])) == []
    assert "not in the expectation" in violations([row], {})[0]
    other = replace(row, config="128 w4")
    assert "no longer compiled" in violations([row], expectation([row, other]))[0]
    # an architecture that was not asked for is not missed
    assert violations([row], expectation([row, replace(row, arch="sm_80")])) == []
    broken = replace(row, error="CompilationError: no")
    assert "does not compile" in violations([broken], expectation([row]))[0]


def test_occupancy() -> None:
    # hand-counted: 65536 registers / (128 * 256 threads) = 2 blocks of 8 warps, of 64 warp slots
    assert occupancy("sm_90", 128, 0, 8) == pytest.approx(16 / 64)
    # 228 KB / (100 KB + 1 KB) = 2 blocks of 4 warps
    assert occupancy("sm_90", 32, 100 * 1024, 4) == pytest.approx(8 / 64)
    assert occupancy("sm_90", 32, 0, 4) == 1.0
    # 512 vector registers of a lane hold 4 waves of 128, on 4 SIMD units of 8 slots
    assert occupancy("gfx942", 128, 0, 4) == pytest.approx(16 / 32)


def test_roofline_and_table() -> None:
    h200 = GPUS["h200"]
    assert h200.roofline_us(989.4e6, 0.0) == pytest.approx(1.0)
    assert h200.roofline_us(1.0, 9.6e6) == pytest.approx(2.0)
    # 128 threads with 8 elements each, 24 instructions a warp: 3 an element, in 1320 turns
    row = Row("k", "64 w4", "sm_90", 4, False, 1e15, 9.6e6, 32, 0, 1024, "", False)
    row = replace(row, units={"fp32": 16, "memory": 8}, work=Work(1320 * 1024.0, 1024, 1320))
    assert row.instructions == 3.0
    # 4 warps of 24 instructions, 1320 times, by 528 schedulers at 1.7 GHz
    assert h200.issue_us(row.warp_instructions) == pytest.approx(4 * 24 * 1320 / 528 / 1700)
    text = render([row], {"sm_90": h200}, ["sm_90"])
    assert (
        "| 1024 | - | 100% | 16 | 0.62 | 3 per element | 0 2 0 0 1 0 0 | 0.1 | 2.2 | 2.0 |" in text
    )


def test_the_overview_has_all_architectures() -> None:
    plain = Row("k", "64 w4", "sm_90", 4, False, 1.0, 1.0, registers=32)
    rows = [
        plain,
        replace(plain, config="128 w4", registers=64),
        # another configuration spills than needs most registers
        replace(plain, arch="sm_86", registers=128, spill_bytes=8),
        replace(plain, arch="sm_86", config="128 w4", registers=255),
        replace(plain, kernel="l", arch="gfx942", registers=100),
        replace(plain, kernel="l", arch="sm_86", error="CompilationError: no"),
    ]
    table = overview(rows)
    assert table[0] == "| kernel | sm_86 | sm_90 | gfx942 |"
    assert table[2:] == ["| k | 255 (8) | 64 | - |", "| l | does not compile | - | 100 |"]
    text = render(rows, {gpu.arch: gpu for gpu in GPUS.values()}, ["sm_90"])
    assert "\n".join(table) in text
    # and every configuration of those asked for
    assert text.count("| k | 64 w4 | sm_90 |") == text.count("| k | 128 w4 | sm_90 |") == 1
    assert "| sm_86 | 128" not in text


def test_interpreting_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert report.main(["--check"]) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


@pytest.mark.usefixtures("compiling")
def test_every_triton_has_an_expectation_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for version in ("3.6.0", "3.6.1", "3.7.1"):
        report.expectation_file(version, tmp_path).write_text(json.dumps({version: {}}), "utf-8")
    # its own, or one of the same minor version
    for version, found in (("3.6.1", "3.6.1"), ("3.6.9", "3.6.0"), ("3.7.4", "3.7.1")):
        assert list(report.find_expectation(version, tmp_path)) == [found]
    with pytest.raises(UserError, match=r"no expectation of Triton 3\.60\.0 \(recorded: 3\.6\.0, "):
        report.find_expectation("3.60.0", tmp_path)
    monkeypatch.setattr(metadata, "version", lambda name: "2.1.0")
    assert report.main(["--check"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "no expectation of Triton 2.1.0" in said[0]


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ({}, ""),
        ({"spill_bytes": 8}, "spills 8 bytes, not 0"),
        ({"shared_bytes": 232449}, "232449 bytes of shared memory, limit 232448"),
        ({"mma": "mma.sync"}, "uses mma.sync, not wgmma"),
        ({"mma": ""}, "uses no mma, not wgmma"),
        ({"serialized": True}, "serialises its wgmma"),
        ({"units": {"fp32": 106}}, "106 instructions per tile, not 100"),
        ({"per_sm": 17}, "launches 17 blocks per multiprocessor, 16 fit"),
        ({"error": "no"}, "does not compile"),
    ],
    ids=str,
)
def test_check_fails_on_each_fault(
    fault: dict[str, Any],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = Row("k", "64 w4", "sm_90", 4, True, 1e9, 1e6, registers=32, mma="wgmma")
    good = replace(good, units={"fp32": 100}, work=Work(1.0, unit="tile"))
    monkeypatch.setattr(report, "measure", lambda *arguments: [replace(good, **fault)])
    monkeypatch.setattr(report, "find_expectation", lambda triton: expectation([good]))
    assert report.main(["--check", "--arch", "sm_90"]) == bool(fault)
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == bool(fault)
    assert all(complaint in line for line in lines)
    assert last == f"1 kernels checked, {len(lines)} worse than expected"


def _by_place(row: Row) -> tuple[str, int]:
    return row.kernel, list(ARCHITECTURES).index(row.arch)


@pytest.mark.usefixtures("compiling")
def test_update_records_what_check_then_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        Row(name, "64 w4", arch, 4, True, 1e9, 1e6, mma="mfma", spill_bytes=8)
        for name in ("a", "b")
        for arch in ARCHITECTURES
    ]
    monkeypatch.setattr(report, "measure", lambda *arguments: rows)
    monkeypatch.setattr(report, "REPORT", tmp_path / "REPORT.md")
    monkeypatch.setattr(report, "expectation_file", lambda triton: tmp_path / f"{triton}.json")
    assert report.main(["--update"]) == 0
    text = (tmp_path / f"{metadata.version('triton')}.json").read_text(encoding="utf-8")
    assert json.loads(text) == expectation(rows)
    # one line a row, and two braces
    assert len(text.splitlines()) == len(rows) + 2
    # one architecture again: the others keep their rows, and a case that is gone loses its row
    again = [replace(rows[0], arch="gfx942", spill_bytes=0)]
    monkeypatch.setattr(report, "measure", lambda *arguments: again)
    assert report.main(["--update", "--arch", "gfx942"]) == 0
    kept = [row for row in rows if row.arch != "gfx942"]
    text = (tmp_path / f"{metadata.version('triton')}.json").read_text(encoding="utf-8")
    assert json.loads(text) == expectation([*kept, *again])
    assert list(json.loads(text)) == [row.key for row in sorted(kept + again, key=_by_place)]


@pytest.mark.usefixtures("compiling")
def test_a_check_of_all_names_what_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row("k", "64 w4", arch, 4, False, 1e9, 1e6) for arch in ARCHITECTURES]
    monkeypatch.setattr(report, "tasks_of", lambda modules, archs: archs)
    monkeypatch.setattr(
        report, "measure", lambda archs, *rest: [row for row in rows if row.arch in archs]
    )
    known = [row for row in rows if row.arch in ("sm_90", "gfx942")]
    monkeypatch.setattr(report, "find_expectation", lambda triton: expectation(known))
    assert report.main(["--check"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert "no record for sm_80, sm_86, sm_89, sm_100, sm_120, gfx90a, gfx950, gfx1100:" in first
    assert last == "2 kernels checked, 0 worse than expected"
    # who asks for one of them has nothing to compare with
    assert report.main(["--check", "--arch", "sm_80"]) == 1
    assert "not in the expectation" in capsys.readouterr().out


def test_the_tested_triton_has_a_record_for_every_architecture() -> None:
    tested = re.search(r"^triton==(.+)$", Path("constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert tested
    recorded = report.read_expectation(report.expectation_file(tested[1]))
    assert {arch_of(name) for name in recorded} == set(ARCHITECTURES)


def test_committed_binaries_are_as_expected() -> None:
    """Every kernel and configuration on the tuned-for architecture; CI runs the whole matrix."""
    try:
        report.find_expectation(metadata.version("triton"))
    except UserError as error:
        pytest.skip(str(error))
    command = ("-m", "fastgpt2.kernels.report", "--check", "--arch", "sm_90", "--sample", "1")
    done = run_compiling(*command)
    assert done.returncode == 0, done.stdout + done.stderr
