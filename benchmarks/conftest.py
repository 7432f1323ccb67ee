"""``pytest benchmarks --benchmark-only``: options, clock, and the JSON's machine record."""

import sys
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from pytest_benchmark.utils import safe_dumps

from benchmarks.harness import TAPE, Lane, Race, Scale, Settings, Stopwatch, lanes
from benchmarks.machine import machine
from fastgpt2.files import write_text

STOPWATCH = pytest.StashKey[Stopwatch]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of a run; defaults depend on the machine."""
    group = parser.getgroup("fastgpt2")
    group.addoption("--scale", choices=[*Scale], help="sizes (default: the device's)")
    group.addoption("--rounds", type=int, help="fewest samples per contender")
    group.addoption("--seconds", type=float, default=0.5, help="fewest seconds per race")
    group.addoption(
        "--budget", type=float, default=inf, help="seconds after which the rest is skipped"
    )
    group.addoption(
        "--skip-memory", action="store_true", help="do not measure peak memory, in extra processes"
    )
    group.addoption(
        "--json-so-far", type=Path, metavar="FILE", help="as --benchmark-json, after each race"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Begin to write, if that is asked for."""
    file = config.getoption("json_so_far")
    if file is not None:
        config.pluginmanager.register(_Writer(config, file))


def _as_json(content: dict[str, Any]) -> str:
    text: str = safe_dumps(content, ensure_ascii=True, indent=4)  # type: ignore[no-untyped-call]
    return text


class _Writer:
    """Writes pytest-benchmark's JSON after each race: a run that is killed leaves the others."""

    def __init__(self, config: pytest.Config, file: Path) -> None:
        self._config, self._file = config, file
        self._race: Race | None = None
        self._machine: dict[str, Any] | None = None

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Before another race begins, which may take minutes."""
        lane = item.callspec.params.get("lane") if hasattr(item, "callspec") else None
        if isinstance(lane, Lane) and lane.race is not self._race:
            self._race = lane.race
            self._write()

    def pytest_sessionfinish(self) -> None:
        """At the end, also that by Ctrl-C."""
        self._write()

    def _write(self) -> None:
        session = self._config._benchmarksession  # type: ignore[attr-defined]
        if not session.benchmarks:
            return
        if self._machine is None:
            self._machine = session.get_machine_info()
        hook, common = self._config.hook, {"config": self._config, "benchmarks": session.benchmarks}
        content = hook.pytest_benchmark_generate_json(
            **common,
            include_data=True,
            machine_info=self._machine,
            commit_info=hook.pytest_benchmark_generate_commit_info(config=self._config),
        )
        hook.pytest_benchmark_update_json(**common, output_json=content)
        write_text(self._file, _as_json(content))


def settings(config: pytest.Config) -> Settings:
    """The options, with the machine's defaults."""
    on_gpu = torch.cuda.is_available()
    scale = Scale(config.getoption("scale") or (Scale.CUDA if on_gpu else Scale.CPU))
    if scale is Scale.CUDA and not on_gpu:
        raise pytest.UsageError("--scale cuda: there is no CUDA GPU here")
    dry = scale is Scale.DRY
    return Settings(
        scale=scale,
        device=torch.device("cuda" if scale is Scale.CUDA else "cpu"),
        rounds=config.getoption("rounds") or (1 if dry else 10),
        seconds=0.0 if dry else config.getoption("seconds"),
        budget=config.getoption("budget"),
        # memory of a dry run means nothing
        memory=not dry and not config.getoption("skip_memory"),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for every contender of the module's races."""
    if "lane" in metafunc.fixturenames:
        found = lanes(metafunc.module.races(settings(metafunc.config)))
        metafunc.parametrize("lane", found, ids=[lane.id for lane in found])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take all samples from the tape."""
    for item in items:
        if isinstance(item, pytest.Function) and "lane" in item.fixturenames:
            item.add_marker(pytest.mark.benchmark(timer=TAPE.now))


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Any:
    """``record(lane)``: run the race if it has not run, and pass on this lane's samples."""
    session, stash = request.session, request.config.stash
    if STOPWATCH not in stash:
        torch.manual_seed(0)
        found = [i.callspec.params.get("lane") for i in session.items if hasattr(i, "callspec")]
        selected = [lane for lane in found if isinstance(lane, Lane)]
        capture = request.config.pluginmanager.getplugin("capturemanager")

        def notify(line: str) -> None:
            with capture.global_and_fixture_disabled():
                print(f"  {line}", file=sys.stderr, flush=True)

        stash[STOPWATCH] = Stopwatch(settings(request.config), selected, notify)
    return lambda lane: stash[STOPWATCH].record(lane, benchmark)


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """Add device, clocks, driver and versions, which a reader needs to judge the numbers."""
    chosen = settings(config)
    machine_info |= {"scale": chosen.scale, **machine(chosen.device)}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Add the peaks measured in the same run: the roofline's two lines."""
    if STOPWATCH in config.stash:
        ceilings = config.stash[STOPWATCH].ceilings
        output_json["ceilings"] = {
            "bytes_per_s": ceilings.bandwidth,
            "flop_per_s": dict(ceilings.flops),
        }
