"""The watch of a job: what it does when the processes' store has gone away."""

import time

import pytest

from fastgpt2 import distributed, peers
from fastgpt2.peers import STUCK, Watch


class Gone:
    """A store whose machine has died, and how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __getattr__(self, name: str) -> object:
        self.asked += 1
        raise RuntimeError("Connection reset by peer")


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> Gone:
    """The second of two processes under torchrun, without a store."""
    store = Gone()
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "job_store", lambda: store)
    monkeypatch.setattr(peers, "_INTERVAL", 0.01)
    return store


def test_a_process_that_hangs_ends_without_a_store(
    gone: Gone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(peers, "_end", codes.append)
    monkeypatch.setattr(distributed, "seconds_since_agreement", lambda: 100.0)
    watch = Watch()
    watch.timeout = 50.0
    deadline = time.monotonic() + 30
    while not codes and time.monotonic() < deadline:
        time.sleep(0.01)
    watch.stop()
    assert codes[0] == STUCK
    assert "rank 1 has not moved on for 50 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "elastic", "speaks"), [(0, True, True), (1, True, False), (0, False, False)]
)
def test_one_process_of_a_machine_says_that_the_store_has_gone(
    gone: Gone, monkeypatch: pytest.MonkeyPatch, place: int, elastic: bool, speaks: bool
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(elastic))
    monkeypatch.setenv("LOCAL_RANK", str(place))
    watch = Watch()
    assert watch.failed(2, wait=True) == (None if speaks else 2)
    watch.stop()
    # each time that it is asked, PyTorch shows a screenful
    assert gone.asked == 1


def test_a_process_that_was_stopped_does_not_hang(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-Z, and fg an hour later: none of its threads has run, so none was stuck."""
    now, looks = [1000.0], 0
    codes: list[int] = []
    monkeypatch.setattr(peers, "_end", codes.append)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    distributed.all_max(0)
    watch = Watch()
    watch.timeout = 50.0

    def wait(seconds: float) -> bool:
        nonlocal looks
        looks += 1
        # the second look comes an hour late
        now[0] += 3600.0 if looks == 2 else seconds
        return looks > 400

    monkeypatch.setattr(watch._stopped, "wait", wait)
    while looks <= 400 and not codes:
        time.sleep(0.001)
    # a minute of looks later it does hang
    assert now[0] - 4600.0 > 50.0 and codes[:1] == [STUCK]
    watch.stop()
