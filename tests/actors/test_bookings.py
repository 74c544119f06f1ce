"""The bookings' books: whatever happens in whatever order, nothing is negative or left behind."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from actors.routing import Bookings, Plan

KEY_TOKENS = 256
WAITING_S, RUNNING_S = 10.0, 100.0


def plan(work_s=1.0, computed=100, kv_tokens=1000, store_load_s=0.0) -> Plan:
    return Plan(0, 0, 0, computed, kv_tokens, work_s, store_load_s=store_load_s)


def one_replica(tokens_per_key=0):
    bookings = Bookings(WAITING_S, RUNNING_S, tokens_per_key)
    return bookings, bookings.add_replica("a", 10_000)


def test_a_booking_is_load_at_once_and_less_after_its_first_token():
    bookings, view = one_replica()
    booking = bookings.book("a", plan(work_s=2.0), 0.0)
    assert (view.num_pending, view.pending_work_s, view.kv_tokens) == (1, 2.0, 1000)
    assert bookings.first_token(booking.booking_id, 2.5).service_s == 2.5
    assert (view.num_pending, view.pending_work_s) == (0, 0.0)
    assert (view.num_running, view.running_kv_tokens, view.kv_tokens) == (1, 1000, 1000)
    bookings.finish(booking.booking_id, 3.0)
    assert (view.num_outstanding, view.running_kv_tokens, view.kv_tokens) == (0, 0, 0)


def test_the_head_of_the_queue_runs_since_it_is_the_head_and_has_loaded():
    bookings, view = one_replica()
    first = bookings.book("a", plan(work_s=2.0, store_load_s=0.5), 0.0)
    second = bookings.book("a", plan(work_s=4.0), 0.1)
    assert (view.head_work_s, view.busy_since_s, view.floor_s) == (2.0, 0.5, 4.0)
    bookings.first_token(first.booking_id, 2.7)
    assert (view.head_work_s, view.busy_since_s, view.floor_s) == (4.0, 2.7, 0.0)
    assert bookings.first_token(second.booking_id, 7.0).service_s == pytest.approx(4.3)


def test_links_are_busy_until_all_booked_transfers_are_done():
    bookings, view = one_replica()
    for _ in range(3):
        bookings.book("a", plan(store_load_s=0.5), 1.0)
    assert (view.store_link_free_s, view.links_free_s) == (2.5, 2.5)


def test_what_nobody_reports_on_expires_sooner_before_the_first_token():
    bookings, view = one_replica()
    lost, kept = (bookings.book("a", plan(), 0.0) for _ in range(2))
    bookings.first_token(kept.booking_id, 9.0)
    assert [one.booking_id for one in bookings.expire(10.0)] == [lost.booking_id]
    assert bookings.first_token(lost.booking_id, 11.0) is None, "too late"
    assert bookings.finish(lost.booking_id, 11.0) is None
    assert bookings.expire(108.9) == []
    assert [one.booking_id for one in bookings.expire(109.0)] == [kept.booking_id]
    assert view.num_outstanding == view.kv_tokens == 0


def test_a_first_token_that_is_told_again_is_a_sign_of_life():
    bookings, _ = one_replica()
    booking = bookings.book("a", plan(), 0.0)
    bookings.first_token(booking.booking_id, 1.0)
    assert bookings.first_token(booking.booking_id, 50.0).service_s is None
    assert bookings.expire(149.0) == []
    assert len(bookings.expire(150.0)) == 1


def test_the_bookings_of_a_removed_replica_end_with_it():
    bookings, _ = one_replica()
    gone = bookings.book("a", plan(), 0.0)
    assert bookings.remove_replica("a") == [gone]
    assert bookings.remove_replica("a") == []
    assert bookings.first_token(gone.booking_id, 1.0) is None
    with pytest.raises(KeyError):
        bookings.book("a", plan(), 1.0)


def test_shared_kv_memory_counts_once():
    bookings, view = one_replica(tokens_per_key=KEY_TOKENS)
    first = bookings.book("a", plan(kv_tokens=1000), 0.0, keys=(1, 2, 3))
    second = bookings.book("a", plan(kv_tokens=800), 0.0, keys=(1, 2, 9))
    assert view.kv_tokens == 1000 + 800 - 2 * KEY_TOKENS
    bookings.finish(first.booking_id, 1.0)
    assert view.kv_tokens == 800
    bookings.finish(second.booking_id, 1.0)
    assert view.kv_tokens == 0


def test_the_mean_of_pending_follows_the_queue_within_seconds():
    bookings, _ = one_replica()
    assert bookings.mean_pending(0.0) == 0.0
    booking = bookings.book("a", plan(), 0.0)
    assert bookings.mean_pending(5.0) == pytest.approx(1 - math.exp(-1))
    bookings.first_token(booking.booking_id, 5.0)
    assert bookings.mean_pending(10.0) == pytest.approx(math.exp(-1) * (1 - math.exp(-1)))


class BookingsMachine(RuleBasedStateMachine):
    """Random events against the simplest books: a dict of what is booked."""

    ids = Bundle("ids")
    names = st.sampled_from(["a", "b", "c"])

    def __init__(self) -> None:
        super().__init__()
        self.bookings = Bookings(WAITING_S, RUNNING_S, KEY_TOKENS)
        self.now_s = 0.0
        self.alive: set[str] = set()
        self.live: dict[int, list] = {}  # id -> [replica, plan, keys, expiry, is running]

    def forget(self, ended) -> None:
        for booking in ended:
            del self.live[booking.booking_id]

    @rule(name=names)
    def add_replica(self, name):
        self.live = {k: v for k, v in self.live.items() if v[0] != name}
        self.bookings.add_replica(name, 1000)
        self.alive.add(name)

    @rule(name=names)
    def remove_replica(self, name):
        self.forget(self.bookings.remove_replica(name))
        self.alive.discard(name)

    @rule(
        target=ids,
        name=names,
        keys=st.lists(st.integers(0, 3), max_size=3, unique=True),
        work_s=st.floats(0.001, 30),
        extra=st.integers(0, 500),
    )
    def book(self, name, keys, work_s, extra):
        if name not in self.alive:
            return -1
        booked = plan(work_s, extra, len(keys) * KEY_TOKENS + extra)
        booking = self.bookings.book(name, booked, self.now_s, keys)
        self.live[booking.booking_id] = [name, booked, keys, self.now_s + WAITING_S, False]
        return booking.booking_id

    @rule(booking_id=ids)
    def first_token(self, booking_id):
        booking = self.bookings.first_token(booking_id, self.now_s)
        assert (booking is not None) == (booking_id in self.live)
        if booking is not None:
            self.live[booking_id][3:] = [self.now_s + RUNNING_S, True]

    @rule(booking_id=ids)
    def finish(self, booking_id):
        booking = self.bookings.finish(booking_id, self.now_s)
        assert (booking is not None) == (self.live.pop(booking_id, None) is not None)

    @rule(seconds=st.floats(0, 6) | st.floats(50, 60))
    def time_passes(self, seconds):
        self.now_s += seconds
        ended = self.bookings.expire(self.now_s)
        overdue = {k for k, v in self.live.items() if v[3] <= self.now_s}
        assert {one.booking_id for one in ended} == overdue
        self.forget(ended)

    @invariant()
    def books_balance(self):
        assert set(self.bookings.replicas) == self.alive
        assert len(self.bookings) == len(self.live)
        assert self.bookings.mean_pending(self.now_s) >= 0
        for name, view in self.bookings.replicas.items():
            mine = [one for one in self.live.values() if one[0] == name]
            pending = [one[1] for one in mine if not one[4]]
            running = [one[1] for one in mine if one[4]]
            shared = {key for one in mine for key in one[2]}
            alone = sum(one[1].kv_tokens - len(one[2]) * KEY_TOKENS for one in mine)
            assert (view.num_pending, view.num_running) == (len(pending), len(running))
            assert view.pending_work_s == pytest.approx(sum(one.work_s for one in pending))
            assert view.pending_tokens == sum(one.computed_tokens for one in pending)
            assert view.running_kv_tokens == sum(one.kv_tokens for one in running)
            assert view.kv_tokens == len(shared) * KEY_TOKENS + alone
            assert 0 <= view.floor_s <= view.pending_work_s + 1e-9
            if not pending:
                assert view.pending_work_s == view.head_work_s == view.floor_s == 0


BookingsMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=25)
TestBookingsMachine = BookingsMachine.TestCase
