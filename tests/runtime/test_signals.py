"""A signal is noted, once or twice, and ranks stop after the same step whoever got it."""

import os
import signal
import threading

from megatree.parallel.comm import OneDevice
from megatree.parallel.threads import ThreadComm, Threads
from megatree.runtime.signals import StopRequest


def test_a_signal_is_noted_and_the_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with StopRequest((signal.SIGTERM, signal.SIGUSR1)) as stop:
        assert stop.got is None
        assert not stop.agreed(OneDevice())
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.got is signal.SIGUSR1, "the first of them"
        assert stop.agreed(OneDevice())
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_all_ranks_stop_after_the_same_step() -> None:
    def body(comm: ThreadComm) -> list[bool]:
        stop, told = StopRequest(()), []
        for step in range(4):
            if comm.rank == 2 and step == 1:
                stop.got = signal.SIGTERM
            told.append(stop.agreed(comm))
        return told

    told = Threads({"dp": 2, "tp": 2}).run(body)
    assert told == [[False, True, True, True]] * 4


def test_a_thread_notes_nothing() -> None:
    found: list[object] = []

    def body() -> None:
        with StopRequest() as stop:
            found.extend([stop.numbers, stop.got])

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [(), None]
