import logging
import threading
import time
from contextlib import ExitStack

import pytest

from shared_cache.errors import StoreReadOnlyError, StoreUnavailableError
from shared_cache.faults import LOST_PATIENCES, REFUSED_PAUSE_S, BackOff, FaultLog, StoreGuard
from tests.shared_cache.fakes import WAIT_S, FakeClock, Gate

logger = logging.getLogger("tests.faults")


def test_pauses_double_up_to_the_limit_and_success_resets_them() -> None:
    clock = FakeClock()
    back_off = BackOff(clock, first_s=1, longest_s=4)
    for pause_s in (1, 2, 4, 4):
        assert back_off.is_over
        back_off.fault()
        clock.now_s += pause_s - 0.01
        assert not back_off.is_over
        clock.now_s += 0.01
    back_off.success()
    back_off.fault()
    clock.now_s += 1
    assert back_off.is_over


def test_faults_of_tries_under_way_do_not_prolong_the_pause() -> None:
    clock = FakeClock()
    back_off = BackOff(clock, first_s=1, longest_s=30)
    for _ in range(5):
        back_off.fault()
    clock.now_s += 1
    assert back_off.is_over


def test_one_log_line_a_minute_says_how_many_were_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()
    faults = FaultLog(logger, clock)
    for _ in range(5):
        faults.record("reading", StoreUnavailableError("gone"))
    clock.now_s += 60
    faults.record("reading", RuntimeError("a bug"))
    assert faults.num_faults == 6
    first, second = caplog.records
    assert first.getMessage() == "reading: gone (0 more since the last such line)"
    assert first.exc_info is None
    assert "4 more" in second.getMessage()
    assert second.exc_info is not None


def test_a_store_that_does_not_answer_is_left_alone_until_it_does() -> None:
    clock = FakeClock()
    faults = FaultLog(logger, clock)
    guard = StoreGuard("reading", 5, faults, clock)
    with guard.operation():
        clock.now_s += 4.9
        assert guard.usable()
        clock.now_s += 0.1
        assert not guard.usable()
        assert not guard.usable()
        assert faults.num_faults == 1
    assert guard.usable()


def test_any_error_of_a_store_ends_here_and_begins_a_pause() -> None:
    clock = FakeClock()
    faults = FaultLog(logger, clock)
    guard = StoreGuard("reading", 5, faults, clock)
    with guard.operation():
        raise OSError("a third-party file system raises anything")
    assert faults.num_faults == 1
    assert not guard.usable()
    clock.now_s += 1
    assert guard.usable()


def call(guard: StoreGuard, clock: FakeClock, seconds: float) -> None:
    with guard.operation("read"):
        clock.now_s += seconds


def test_one_call_that_hangs_does_not_stop_a_store_that_answers_others() -> None:
    clock = FakeClock()
    faults = FaultLog(logger, clock)
    guard = StoreGuard("reading", 5, faults, clock)
    with ExitStack() as hanging:
        hanging.enter_context(guard.operation("read"))
        for _ in range(3):
            clock.now_s += 4
            call(guard, clock, 0.5)
            assert guard.usable()
        assert faults.num_faults == guard.num_faults == 1, "the hanging one"
        clock.now_s += 100
        assert guard.usable(), "later calls have ended: it says nothing of the store"
    assert guard.num_faults == 1


def test_reads_that_hang_are_noticed_although_look_ups_are_answered() -> None:
    clock = FakeClock()
    guard = StoreGuard("reading", 5, FaultLog(logger, clock), clock)
    with ExitStack() as hanging:
        hanging.enter_context(guard.operation("read"))
        for _ in range(3):
            clock.now_s += 2
            with guard.operation("match"):
                pass
        assert guard.is_hanging()


def test_a_call_that_many_patiences_did_not_end_is_lost_once_a_later_one_ends() -> None:
    clock = FakeClock()
    guard = StoreGuard("reading", 5, FaultLog(logger, clock), clock)
    lost: list[threading.Thread] = []
    guard.on_lost = lost.append
    with ExitStack() as hanging:
        hanging.enter_context(guard.operation("read"))
        clock.now_s += 5 * LOST_PATIENCES - 1
        call(guard, clock, 0.5)
        assert lost == [], "it may be slow only"
        call(guard, clock, 0.5)
        assert lost == [threading.current_thread()]
        clock.now_s += 100
        assert guard.usable()


def test_who_asks_for_a_store_that_hangs_has_its_call_repeated_after_growing_pauses() -> None:
    clock = FakeClock()
    guard = StoreGuard("reading", 5, FaultLog(logger, clock), clock)
    lost: list[threading.Thread] = []
    guard.on_lost = lost.append
    gate, tried = Gate(), threading.Semaphore(0)

    def again() -> None:
        tried.release()
        gate()

    with ExitStack() as hanging:
        hanging.enter_context(guard.operation("read", again))
        assert not tried.acquire(timeout=0)
        for pause_s in (5, 1, 2, 4):
            clock.now_s += pause_s - 0.01
            assert not guard.usable() or pause_s == 5
            assert not tried.acquire(timeout=0.02), "the pause is not over"
            clock.now_s += 0.01
            assert not guard.usable()
            assert tried.acquire(timeout=WAIT_S)
        assert lost == []
        gate.open()
        while not guard.usable():
            time.sleep(0.001)
        assert threading.current_thread() in lost, "its thread is to be replaced"
        clock.now_s += 100
        assert guard.usable()


def test_a_store_that_refuses_is_left_alone_for_long_and_asked_again() -> None:
    clock = FakeClock()
    guard = StoreGuard("writing", 5, FaultLog(logger, clock), clock)
    for pause_s in (REFUSED_PAUSE_S, 2 * REFUSED_PAUSE_S):
        assert guard.usable()
        with guard.operation():
            raise StoreReadOnlyError("403")
        clock.now_s += pause_s - 1
        assert guard.refuses
        assert not guard.usable()
        clock.now_s += 1
    assert guard.usable()
    assert not guard.refuses


def test_a_store_that_fails_rests_but_does_not_hang() -> None:
    clock = FakeClock()
    guard = StoreGuard("reading", 5, FaultLog(logger, clock), clock)
    with guard.operation():
        raise StoreUnavailableError("gone")
    assert not guard.usable()
    assert not guard.is_hanging()
    assert guard.num_faults == 1
