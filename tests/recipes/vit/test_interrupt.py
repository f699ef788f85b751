import os
import signal
import threading

import pytest

from learnables.recipes.vit.interrupt import Interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_raises_a_flag_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), number)
        assert interrupt.requested
    assert signal.getsignal(number) is before


def test_second_ctrl_c_ends_at_once():
    with Interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_many_processes_wait_for_each_other_however_often_it_is_pressed():
    with Interrupt(patient=True) as interrupt:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested


def test_other_threads_go_without():
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(Interrupt().__enter__().requested))
    thread.start()
    thread.join()
    assert outcome == [False]
