import os
import signal
import threading

import pytest

from lco_lite.context import InterruptGuard


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_to_stop_and_says_so(number, capfd):
    with InterruptGuard() as guard:
        assert not guard.requested
        signal.raise_signal(number)
        assert guard.requested
    assert (
        "finishing the current batch, then a checkpoint; press Ctrl-C again to stop at once" in capfd.readouterr().err
    )


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once(second):
    with pytest.raises(KeyboardInterrupt), InterruptGuard():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(second)


def test_the_handlers_before_come_back_also_after_an_error():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(RuntimeError), InterruptGuard():
        assert signal.getsignal(signal.SIGINT) != before[signal.SIGINT]
        raise RuntimeError
    assert {number: signal.getsignal(number) for number in before} == before


def test_an_inner_guard_hands_back_to_the_outer_one():
    with InterruptGuard() as outer:
        with InterruptGuard() as inner:
            signal.raise_signal(signal.SIGINT)
        assert inner.requested and not outer.requested
        signal.raise_signal(signal.SIGINT)
        assert outer.requested


def test_outside_the_main_thread_it_changes_nothing():
    seen = []

    def work():
        with InterruptGuard() as guard:
            seen.append((guard.requested, signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_a_closed_stderr_does_not_turn_the_request_into_an_error():
    saved = os.dup(2)
    try:
        os.close(2)
        with InterruptGuard() as guard:
            signal.raise_signal(signal.SIGINT)
            assert guard.requested
    finally:
        os.dup2(saved, 2)
        os.close(saved)
