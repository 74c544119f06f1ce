"""KV cache events: what the device is believed to hold, in our own hashes; in doubt, less."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engines.trtllm import events
from actors.engines.trtllm.events import PoolEvents
from shared_cache.hashing import DEFAULT_SCOPE, BlockHash, ReuseScope, block_hashes, next_hash
from tests.trtllm_engine.pool import Pool

BLOCK = 4
SALTED = ReuseScope("tenant")


def hashes(tokens: Sequence[int], scope: ReuseScope = DEFAULT_SCOPE) -> Sequence[BlockHash]:
    return block_hashes(tokens, BLOCK, scope)


def feed(known: PoolEvents, pool: Pool) -> None:
    while pool.events:
        known.take(pool.events.pop(0))


def ran(known: PoolEvents, pool: Pool, tokens: list[int], scope: ReuseScope) -> None:
    known.expect(tokens, scope)
    pool.begin(tokens, scope.cache_salt)
    feed(known, pool)


def test_the_hash_of_a_next_block_is_the_chain_s() -> None:
    tokens = list(range(12))
    first, second, third = hashes(tokens, SALTED)
    assert next_hash(SALTED.root_hash(), tokens[:4]) == first
    assert next_hash(first, tokens[4:8]) == second
    assert next_hash(second, tokens[8:]) == third


def test_what_a_request_leaves_is_known_by_its_own_hashes() -> None:
    known, pool = PoolEvents(BLOCK), Pool(BLOCK, 64, 0, 100)
    prompt = list(range(14))
    ran(known, pool, prompt, DEFAULT_SCOPE)
    assert known.num_on_device(hashes(prompt)) == 3
    assert known.num_on_device(hashes(prompt, SALTED)) == 0
    assert known.max_num_blocks == 64
    assert known.num_malformed == known.num_unplaced == 0
    longer = [*prompt, *range(50, 60)]
    pool.end(longer, None)  # the unfinished block of before was never one
    feed(known, pool)
    assert known.num_on_device(hashes(longer)) == 6


def test_blocks_of_two_tenants_with_one_beginning_are_told_apart() -> None:
    known, pool = PoolEvents(BLOCK), Pool(BLOCK, 64, 0, 100)
    prompt = list(range(9))
    ran(known, pool, prompt, DEFAULT_SCOPE)
    ran(known, pool, prompt, SALTED)
    assert known.num_on_device(hashes(prompt)) == known.num_on_device(hashes(prompt, SALTED)) == 2


def test_a_beginning_that_two_may_have_brought_is_believed_of_none() -> None:
    known, pool = PoolEvents(BLOCK), Pool(BLOCK, 64, 0, 100)
    prompt = list(range(9))
    known.expect(prompt, DEFAULT_SCOPE)
    known.expect(prompt, SALTED)
    pool.begin(prompt, None)
    feed(known, pool)
    assert known.num_on_device(hashes(prompt)) == known.num_on_device(hashes(prompt, SALTED)) == 0
    assert known.num_unplaced == 1


def test_removed_blocks_are_gone_and_come_back_under_the_same_scope() -> None:
    known, pool = PoolEvents(BLOCK), Pool(BLOCK, 2, 0, 100)
    first, second = list(range(9)), list(range(100, 109))
    ran(known, pool, first, SALTED)
    ran(known, pool, second, DEFAULT_SCOPE)
    assert known.num_on_device(hashes(first, SALTED)) == 0
    assert known.num_on_device(hashes(second)) == 2
    known.expect(first, DEFAULT_SCOPE)  # a new one, but the engine's own hash names the old one
    pool.begin(first, SALTED.cache_salt)
    feed(known, pool)
    assert known.num_on_device(hashes(first, SALTED)) == 2
    assert known.num_on_device(hashes(first)) == 0


def test_blocks_on_the_host_are_not_on_the_device() -> None:
    known, pool = PoolEvents(BLOCK), Pool(BLOCK, 2, 8, 100)
    first, second = list(range(9)), list(range(100, 109))
    ran(known, pool, first, DEFAULT_SCOPE)
    ran(known, pool, second, DEFAULT_SCOPE)
    assert known.num_on_device(hashes(first)) == 0
    assert pool.begin(first, None) == 8
    feed(known, pool)
    assert known.num_on_device(hashes(first)) == 2


def test_lost_events_make_everything_be_learned_anew() -> None:
    known, pool = PoolEvents(BLOCK), Pool(BLOCK, 8, 0, 100)
    first, second, third = (list(range(start, start + 9)) for start in (0, 50, 90))
    ran(known, pool, first, DEFAULT_SCOPE)
    known.expect(second)
    pool.begin(second, None)
    pool.events.clear()  # the buffer was too small
    ran(known, pool, third, DEFAULT_SCOPE)
    assert known.num_gaps == 1
    assert known.num_on_device(hashes(first)) == 0
    assert known.num_on_device(hashes(third)) == 2
    assert known.take_changes().is_cleared


def test_changes_are_where_blocks_are_in_the_end() -> None:
    known, pool = PoolEvents(BLOCK), Pool(BLOCK, 4, 2, 100)
    first, second = list(range(9)), list(range(100, 113))
    ran(known, pool, first, DEFAULT_SCOPE)
    created = known.take_changes()
    assert set(created.stored) == set(hashes(first))
    assert (created.removed, created.is_cleared) == ((), True)
    held = dict.fromkeys(created.stored, "device")
    for tokens in (second, list(range(200, 209)), first, list(range(300, 313))):
        ran(known, pool, tokens, DEFAULT_SCOPE)
        changes = known.take_changes()
        assert not changes.is_cleared
        held.update(dict.fromkeys(changes.stored, "device"))
        held.update(dict.fromkeys(changes.offloaded, "host"))
        for one in changes.removed:
            held.pop(one, None)
        levels = {one: "host" if level else "device" for one, level in known._levels.items()}
        assert held == levels
    assert "host" in held.values()
    assert not known.take_changes()


def test_changes_that_nobody_takes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_CHANGES", 8)
    known, pool = PoolEvents(BLOCK), Pool(BLOCK, 4, 0, 100)
    for start in range(0, 400, 20):
        ran(known, pool, list(range(start, start + 9)), DEFAULT_SCOPE)
    changes = known.take_changes()
    assert changes.is_cleared
    assert len(changes.removed) + len(changes.stored) <= 8 + 4


MALFORMED: list[Any] = [
    None,
    "text",
    {},
    {"event_id": 1},
    {"event_id": 1, "data": {}},
    {"event_id": 1, "data": {"type": "new kind"}},
    {"event_id": "x", "data": {"type": "removed", "block_hashes": []}},
    {"event_id": 1, "data": {"type": "stored", "blocks": None, "parent_hash": None}},
    {"event_id": 1, "data": {"type": "stored", "parent_hash": 1, "blocks": [{"block_hash": 2}]}},
    {"event_id": 1, "data": {"type": "removed", "block_hashes": [None]}},
    {"event_id": 1, "data": {"type": "created", "num_blocks_per_cache_level": 3}},
]


@pytest.mark.parametrize("event", MALFORMED, ids=str)
def test_what_is_no_event_is_counted_and_harms_nothing(event: Any) -> None:
    known, pool = PoolEvents(BLOCK), Pool(BLOCK, 8, 0, 100)
    known.take(event)
    assert known.num_malformed == 1
    ran(known, pool, list(range(9)), DEFAULT_SCOPE)
    assert known.num_malformed == 1


def test_a_change_of_priority_alone_moves_nothing() -> None:
    known, pool = PoolEvents(BLOCK), Pool(BLOCK, 8, 0, 100)
    ran(known, pool, list(range(9)), DEFAULT_SCOPE)
    one = pool.hashes(list(range(9)), None)[0]
    priority = {"type": "event_diff", "new_value": 3, "old_value": 35}
    data = {"type": "updated", "block_hash": one, "cache_level": None, "priority": priority}
    known.take({"event_id": pool._num_events, "data": data})
    assert known.num_on_device(hashes(list(range(9)))) == 2


def test_pictures_are_not_told_by_tokens() -> None:
    known, pool = PoolEvents(BLOCK), Pool(BLOCK, 8, 0, 100)
    known.expect(list(range(9)))
    pool.begin(list(range(9)), None)
    pool.events[-1]["data"]["blocks"][1]["tokens"][2]["token_extra_id"] = 5
    feed(known, pool)
    assert known.num_on_device(hashes(list(range(9)))) == 1


def test_events_in_lists_by_window_are_taken_too() -> None:
    known, pool = PoolEvents(BLOCK), Pool(BLOCK, 8, 0, 100)
    known.expect(list(range(9)))
    pool.begin(list(range(9)), None)
    known.take(list(pool.events))
    assert known.num_on_device(hashes(list(range(9)))) == 2


PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=20)
SCOPES = st.sampled_from([DEFAULT_SCOPE, SALTED, ReuseScope("other")])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(PROMPTS, SCOPES, st.booleans()), max_size=25),
    st.integers(1, 12),
    st.integers(0, 4),
)
def test_no_block_is_believed_that_the_device_does_not_hold(
    requests: list[tuple[list[int], ReuseScope, bool]], num_blocks: int, num_host_blocks: int
) -> None:
    known, pool = PoolEvents(BLOCK), Pool(BLOCK, num_blocks, num_host_blocks, 100)
    for tokens, scope, is_lost in requests:
        known.expect(tokens, scope)
        pool.begin(tokens, scope.cache_salt)
        if is_lost and pool.events:
            pool.events.pop(0)
        feed(known, pool)
        pool._emit("removed", block_hashes=[])  # shows a gap, should the last one be missing
        feed(known, pool)
        for other, other_scope, _ in requests:
            own = pool.hashes(other, other_scope.cache_salt)
            there = 0
            while there < len(own) and own[there] in pool.device:
                there += 1
            assert known.num_on_device(hashes(other, other_scope)) <= there
