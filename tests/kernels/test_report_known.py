"""A kernel whose key is recorded is not compiled again, and a wrong record does not last."""

import copy
from typing import Any

import pytest

from fastgpt2.kernels import report
from fastgpt2.kernels.machine_code import SPLIT
from fastgpt2.kernels.report_rows import Row, expectation, violations

PLANTED = ["tests.kernels.planted_kernels"]
ARCHS = ["sm_80", "sm_90"]
FOUND = {
    "registers": 40,
    "spill_bytes": 0,
    "shared_bytes": 1024,
    "mma": "wgmma",
    "serialized": False,
    "units": dict.fromkeys(SPLIT, 100),
    "skipped": 0,
}


class PlayedPool:
    """A process pool whose only worker is this process."""

    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def __enter__(self) -> "PlayedPool":
        return self

    def __exit__(self, *fault: object) -> None: ...

    map = staticmethod(map)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[report.Task]:
    """What the compiler, which is played, has been asked for."""
    tasks: list[report.Task] = []

    def compile_task(task: report.Task) -> dict[str, Any]:
        tasks.append(task)
        return FOUND

    monkeypatch.setattr(report, "ProcessPoolExecutor", PlayedPool)
    monkeypatch.setattr(report, "_resources", compile_task)
    return tasks


@pytest.fixture
def recorded(asked: list[report.Task]) -> dict[str, dict[str, Any]]:
    """The expectation of the planted kernels."""
    rows = report.measure(report.tasks_of(PLANTED, ARCHS), 1)
    assert len(asked) == len(rows) == 6
    asked.clear()
    return expectation(rows)


def _measure(recorded: dict[str, Any], sample: int | None = 0) -> list[Row]:
    return report.measure(report.tasks_of(PLANTED, ARCHS), 1, recorded, sample)


def test_what_is_known_is_not_compiled(
    asked: list[report.Task], recorded: dict[str, dict[str, Any]]
) -> None:
    rows = _measure(recorded)
    assert asked == []
    assert expectation(rows) == recorded
    assert {row.registers for row in rows} == {40} and rows[0].units == FOUND["units"]
    # neither is one with another key, or with none
    changed, bare, *_ = recorded
    recorded[changed]["binary"] = "0" * 16
    del recorded[bare]["binary"]
    _measure(recorded)
    assert {task.name for task in asked} == {changed, bare}
    # a cached answer would do: it has the same key
    assert not any(task.anew for task in asked)


@pytest.mark.parametrize(("sample", "count"), [(2, 2), (99, 6), (None, 6)])
def test_some_are_compiled_all_the_same(
    sample: int | None, count: int, asked: list[report.Task], recorded: dict[str, dict[str, Any]]
) -> None:
    assert expectation(_measure(recorded, sample)) == recorded
    assert len(asked) == count
    # and not looked up
    assert all(task.anew for task in asked)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("registers", 41),
        ("spill_bytes", 8),
        ("shared_bytes", 0),
        ("skipped", 1),
        ("units", [100] * 6 + [101]),
    ],
)
@pytest.mark.usefixtures("asked")
def test_a_record_of_something_else_is_found(
    name: str, value: Any, recorded: dict[str, dict[str, Any]]
) -> None:
    assert violations(_measure(recorded, None), recorded) == []
    wrong = copy.deepcopy(recorded)
    lie = next(iter(wrong))
    wrong[lie][name] = value
    (line,) = violations(_measure(wrong, None), wrong)
    assert line == f"{lie}: recompiled, it differs from the record; --update --all"


def test_a_fault_in_a_record_is_a_fault(recorded: dict[str, dict[str, Any]]) -> None:
    """What is believed is judged like what is compiled."""
    entry = next(iter(recorded))
    recorded[entry]["shared_bytes"] = 10**6
    (line,) = violations(_measure(recorded), recorded)
    assert "1000000 bytes of shared memory, limit" in line


def test_what_does_not_compile_is_not_recorded(
    asked: list[report.Task],
    recorded: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "_resources", lambda task: {"error": "CompilationError: no"})
    broken = _measure(recorded, None)
    assert expectation(broken) == {}
    assert len(violations(broken, recorded)) == len(recorded)


def test_every_record_has_its_day() -> None:
    names = [str(i) for i in range(1017)]
    days = [report.daily_sample(names, 12, 739000 + day) for day in range(85)]
    assert {len(day) for day in days} == {12}
    assert not days[0] & days[1]
    assert set().union(*days) == set(names)
    assert report.daily_sample(names, 0, 5) == report.daily_sample([], 12, 5) == set()
