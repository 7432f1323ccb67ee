import os
import signal
from threading import Thread

import pytest

from fastgpt2.train.interrupt import Interrupt, Interrupted

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
