import os
import signal
import time
from contextlib import nullcontext
from threading import Thread

import pytest

from fastgpt2 import distributed
from fastgpt2.train.interrupt import Interrupt, Interrupted, nothing_to_save

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_waits_for_a_safe_place(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in NUMBERS]
    with Interrupt() as interrupt:
        interrupt.poll()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted) as error:
            interrupt.poll()
        # a second one acts as it always does
        assert [signal.getsignal(n) for n in NUMBERS] == before
    assert str(error.value) == number.name
    assert error.value.exit_code == 128 + number


def test_the_second_ctrl_c_acts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_under_torchrun_the_echo_of_a_signal_is_no_second_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slurm sends it to all processes of a job, and torchrun then passes on its own."""
    now = 100.0
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        now += 1.0
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            interrupt.poll()
        now += 2.0
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("seconds", [1.0, 3.0])
def test_a_signal_to_another_process_is_the_first_one_of_all(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """A second one ends this process, unless it is the first that somebody has sent to all."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(distributed, "all_max", lambda *values: [int(signal.SIGINT)])
    with Interrupt() as interrupt:
        with pytest.raises(Interrupted, match="SIGINT"):
            interrupt.poll()
        now += seconds
        with pytest.raises(KeyboardInterrupt) if seconds > 2 else nullcontext():
            os.kill(os.getpid(), signal.SIGINT)


def test_another_signal_acts_at_once_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(KeyboardInterrupt), Interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_save_that_is_asked_for_before_the_training_does_not_end_it() -> None:
    with nothing_to_save():
        os.kill(os.getpid(), signal.SIGUSR1)
        with Interrupt() as interrupt:
            assert not interrupt.save_is_wanted()
            os.kill(os.getpid(), signal.SIGUSR1)
            assert interrupt.save_is_wanted()
        os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(n) for n in NUMBERS]
    with Interrupt():
        assert [signal.getsignal(n) for n in NUMBERS] != before
    assert [signal.getsignal(n) for n in NUMBERS] == before


def test_in_another_thread_signals_are_left_alone() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with Interrupt() as interrupt:
                interrupt.poll()
        except BaseException as error:
            failures.append(error)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
