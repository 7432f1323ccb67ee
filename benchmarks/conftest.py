"""``pytest benchmarks --benchmark-only``: options, clock, and the JSON's machine record."""

import sys
from math import inf
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import TAPE, Lane, Scale, Settings, Stopwatch, lanes
from benchmarks.machine import machine

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
