import logging

import pytest

from shared_cache.errors import StoreUnavailableError
from shared_cache.faults import BackOff, FaultLog, StoreGuard
from tests.shared_cache.fakes import FakeClock

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


def test_one_call_that_hangs_does_not_stop_a_store_that_answers_others() -> None:
    clock = FakeClock()
    faults = FaultLog(logger, clock)
    guard = StoreGuard("reading", 5, faults, clock)
    with guard.operation():
        for _ in range(3):
            clock.now_s += 4
            with guard.operation():
                clock.now_s += 0.5
            assert guard.usable()
        assert faults.num_faults == guard.num_faults == 1, "the hanging one"
        clock.now_s += 5
        assert guard.is_hanging()
        assert not guard.usable()
    assert guard.usable()
    assert guard.num_faults == 1


def test_a_store_that_fails_rests_but_does_not_hang() -> None:
    clock = FakeClock()
    guard = StoreGuard("reading", 5, FaultLog(logger, clock), clock)
    with guard.operation():
        raise StoreUnavailableError("gone")
    assert not guard.usable()
    assert not guard.is_hanging()
    assert guard.num_faults == 1
