"""The page's tables are the tool's, and the tool agrees with runs that were measured."""

import pytest

from tools.scaling import (
    MODELS,
    PAGE,
    PUBLISHED,
    Machine,
    Published,
    ddp,
    fsdp,
    memory,
    predicted,
    tables,
)


def test_the_page_has_the_tables_of_today() -> None:
    assert tables() in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("run", PUBLISHED, ids=lambda run: run.name)
def test_measured_runs(run: Published) -> None:
    assert predicted(run, Machine()) == pytest.approx(run.tokens_per_second, rel=0.1)


def test_parameters_are_those_of_the_model() -> None:
    # 50,257 rows of the released 124M, padded to 50,304
    assert MODELS[0].parameters == 124_439_808 + (50304 - 50257) * 768


def test_one_gpu_sends_nothing_and_more_lose_something() -> None:
    for step in (ddp, fsdp):
        assert step(MODELS[0], 1, 2**14, Machine()).exposed == 0.0
        shares = [
            (lambda s: s.compute / s.seconds)(step(MODELS[0], n, n * 2**14, Machine()))
            for n in (8, 64, 1024)
        ]
        assert shares == sorted(shares, reverse=True)
    assert memory(MODELS[3], 8, sharded=True) < memory(MODELS[3], 8, sharded=False) / 6
