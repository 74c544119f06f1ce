"""Budgets: copies keep to their share of decoding turns, transfers to their bandwidth."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_cache.pacing import BandwidthLimit, TurnBudget


def measured(share, block_s, turn_s):
    budget = TurnBudget(share)
    for _ in range(5):
        budget.saw_copies(4, 4 * block_s)
        budget.saw_decode_turn(turn_s)
    return budget


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 1.0), st.floats(1e-5, 0.1), st.floats(1e-3, 0.2))
def test_copies_keep_to_their_share_and_use_it(share, block_s, turn_s):
    budget = measured(share, block_s, turn_s)
    copied_s, num_turns = 0.0, 400
    for _ in range(num_turns):
        room = budget.begin_turn(is_decoding=True)
        assert room * block_s <= max(share * turn_s, block_s) * 1.001
        budget.spend(room)
        copied_s += room * block_s
    earned_s = num_turns * share * turn_s
    assert copied_s <= earned_s * 1.001
    # What a turn earns beyond whole blocks is kept for the next, up to one turn's earnings.
    assert copied_s >= 0.5 * earned_s - block_s


def test_a_block_that_takes_longer_than_a_turns_share_is_copied_now_and_then():
    budget = measured(0.1, block_s=0.005, turn_s=0.01)
    rooms = []
    for _ in range(10):
        rooms.append(budget.begin_turn(is_decoding=True))
        budget.spend(rooms[-1])
    assert rooms == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]


def test_what_was_not_needed_is_not_saved_up_for_a_pause():
    budget = measured(0.5, block_s=0.001, turn_s=0.01)
    for _ in range(100):
        budget.begin_turn(is_decoding=True)
    assert budget.begin_turn(is_decoding=True) == 5


def test_more_than_the_room_is_paid_back_later():
    budget = measured(0.5, block_s=0.001, turn_s=0.01)
    assert budget.begin_turn(is_decoding=True) == 5
    budget.spend(15)
    rooms = [budget.begin_turn(is_decoding=True) for _ in range(3)]
    assert rooms == [0, 0, 5]


def test_there_is_no_limit_while_nothing_decodes_or_nothing_is_known():
    budget = measured(0.1, 0.001, 0.01)
    assert budget.begin_turn(is_decoding=False) is None
    budget.spend(1000)
    assert budget.begin_turn(is_decoding=True) == 0  # these 1000 count
    assert budget.begin_turn(is_decoding=False) is None
    assert budget.begin_turn(is_decoding=True) == 1  # and are forgotten with the next pause
    new = TurnBudget(0.1)
    new.saw_decode_turn(0.01)
    assert new.begin_turn(is_decoding=True) is None
    new.saw_copies(0, 0.0)
    assert new.begin_turn(is_decoding=True) is None


requests = st.lists(st.tuples(st.floats(0, 2), st.integers(1, 5000)), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(requests)
def test_transfers_that_wait_as_told_keep_to_the_bandwidth(wanted):
    now_s, rate, burst_s = [0.0], 1000.0, 0.5
    limit = BandwidthLimit(rate, burst_s, clock=lambda: now_s[0])
    begun = []
    for pause_s, num_bytes in wanted:
        now_s[0] += pause_s
        begun.append((now_s[0] + limit.delay_s(num_bytes), num_bytes))
    for first, (start_s, _) in enumerate(begun):
        for last in range(first, len(begun)):
            *before, (_, _) = begun[first : last + 1]
            allowed = rate * (begun[last][0] - start_s + burst_s) + 1e-6
            assert sum(num_bytes for _, num_bytes in before) <= allowed


def test_an_idle_link_is_used_at_once_and_a_busy_one_at_its_rate():
    now_s = [100.0]
    limit = BandwidthLimit(1000.0, burst_s=0.0, clock=lambda: now_s[0])
    assert [limit.delay_s(500) for _ in range(3)] == pytest.approx([0.0, 0.5, 1.0])
    now_s[0] += 60
    assert limit.delay_s(500) == 0.0


def test_no_limit_is_no_wait():
    limit = BandwidthLimit(None)
    assert [limit.delay_s(1 << 40) for _ in range(3)] == [0.0] * 3


def test_what_was_booked_and_not_used_is_given_back() -> None:
    now_s = [100.0]
    limit = BandwidthLimit(1000.0, burst_s=0.0, clock=lambda: now_s[0])
    assert limit.seconds(500) == pytest.approx(0.5)
    limit.delay_s(500)
    assert limit.seconds(500) == pytest.approx(1.0)
    limit.give_back(400)
    assert limit.delay_s(500) == pytest.approx(0.1)
