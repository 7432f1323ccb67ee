"""A pytest plugin for tests that may be stopped: a few of each first, and every result at once.

``benchmarks/on_gpu.sh`` loads it for its stage ``correct``. Nearly every parameter set of a
kernel's test compiles binaries of its own, more than the stage has time for: ``--most-per-test``
takes some of them, spread over the list, and the first of every test come before the second of
any. ``--results-so-far`` gets a line of JSON for each test as soon as it has ended, which a process
that is killed leaves.
"""

import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import pytest

from tests.spread import spread


def pytest_addoption(parser: pytest.Parser) -> None:
    """Both are off by default."""
    group = parser.getgroup("fastgpt2")
    group.addoption("--most-per-test", type=int, metavar="N", help="parameter sets of each test")
    group.addoption("--results-so-far", type=Path, metavar="FILE", help="JSON, a line per test")


def breadth_first(items: Sequence[pytest.Item], most: int) -> list[pytest.Item]:
    """At most ``most`` of each test's parameter sets, the first of every test first."""
    by_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    rounds = zip_longest(*(spread(of_test, most) for of_test in by_test.values()))
    return [item for turn in rounds for item in turn if item is not None]


# after the tests that -m and -k leave out
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose and order them; every worker of pytest-xdist comes to the same list."""
    most = config.getoption("most_per_test")
    if most is None:
        return
    chosen = breadth_first(items, most)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def pytest_configure(config: pytest.Config) -> None:
    """Begin the file, in the process that hears of all results."""
    file = config.getoption("results_so_far")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(file))


class _Recorder:
    def __init__(self, file: Path) -> None:
        self._file = file
        file.write_text("", encoding="utf-8")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test has one line, or two if its fixtures fail after it."""
        # a test that passes reports its setup, too, and one that is skipped nothing else
        if report.when != "call" and report.outcome == "passed":
            return
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        if report.failed:
            line["why"] = report.longreprtext[-2000:]
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
