"""The match call: a look-up where a replica staged before, and never longer than its rule says."""

import time

import pytest

from shared_cache.connector.interface import RequestData, SchedulerOutput
from shared_cache.connector.matching import OWNER_TURN_S, OWNER_WAIT_S, MatchRule
from shared_cache.connector.scheduler import SharedCacheScheduler
from shared_cache.hashing import block_hashes
from tests.shared_cache.fakes import LAYOUT, WAIT_S, Gate, ScriptedStore, make_cache, save_blocks
from tests.shared_cache.fakes import chain_of as chain
from tests.shared_cache.mini_engine import MiniRequest
from tests.shared_cache.scripted_cache import ScriptedCache
from tests.shared_cache.test_plan_wire import loads_of

SIZE = 4
TOKENS = list(range(30))
LONG_S = 5.0


def awaited(condition: object, timeout_s: float = WAIT_S) -> None:
    """Wait for something that a thread of ours does without telling anybody."""
    assert callable(condition)
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def match(scheduler: SharedCacheScheduler, id_: int = 1, num_on_device: int = 0) -> int:
    num_tokens, is_async = scheduler.get_num_new_matched_tokens(
        MiniRequest(id_, TOKENS), num_on_device
    )
    assert not is_async
    return num_tokens


@pytest.mark.parametrize(
    ("rule", "num_matched", "asked"),
    [
        (MatchRule(), 5, ["lease_held"]),
        (MatchRule(staged_ahead=True, wait_s=LONG_S), 5, ["lease_held"]),
        (MatchRule(staged_ahead=False), 5, ["lease"]),
        (MatchRule(staged_ahead=False, wait_s=LONG_S), 7, ["lease", "grow"]),
    ],
)
def test_the_rule_says_how_far_a_match_looks(
    rule: MatchRule, num_matched: int, asked: list[str]
) -> None:
    cache = ScriptedCache(num_here=5)
    cache.num_stored = 7
    scheduler = SharedCacheScheduler(cache, SIZE, rule)
    assert match(scheduler) == num_matched * SIZE
    assert cache.asked == asked
    assert list(cache.leases.values()) == [num_matched]
    scheduler.close()


def test_a_match_loads_behind_the_device_what_it_leased_there() -> None:
    cache = ScriptedCache(num_here=3)
    cache.num_stored = 6
    scheduler = SharedCacheScheduler(cache, SIZE, MatchRule(staged_ahead=False, wait_s=LONG_S))
    assert match(scheduler, num_on_device=2 * SIZE) == 4 * SIZE
    blocks = list(range(100, 108))
    plan = scheduler.build_connector_meta(
        SchedulerOutput([RequestData(1, TOKENS, blocks, 2 * SIZE, 6)])
    )
    assert loads_of(plan, 0) == {100 + index: index for index in range(2, 6)}
    scheduler.close()


def test_nobody_is_asked_for_a_prompt_that_is_on_the_device() -> None:
    cache = ScriptedCache(num_here=7)
    scheduler = SharedCacheScheduler(cache, SIZE, MatchRule(staged_ahead=False, wait_s=LONG_S))
    assert match(scheduler, num_on_device=28) == 0
    assert cache.asked == []
    scheduler.close()


def test_a_block_that_leaves_no_token_to_compute_is_not_waited_for() -> None:
    cache = ScriptedCache(num_here=6)
    cache.num_stored = 7
    scheduler = SharedCacheScheduler(cache, SIZE, MatchRule(staged_ahead=False, wait_s=LONG_S))
    assert scheduler.get_num_new_matched_tokens(MiniRequest(1, TOKENS[:28]), 0) == (24, False)
    assert cache.asked == ["lease"]
    scheduler.close()


@pytest.mark.parametrize("verb", ["lease", "grow"])
def test_a_look_up_that_hangs_is_left_and_what_it_finds_is_given_back(verb: str) -> None:
    cache, gate = ScriptedCache(num_here=5), Gate()
    cache.num_stored = 7
    setattr(cache, f"on_{verb}", gate)
    scheduler = SharedCacheScheduler(cache, SIZE, MatchRule(staged_ahead=False, wait_s=0.5))
    start_s = time.monotonic()
    assert match(scheduler) == 0
    waited_s = time.monotonic() - start_s
    assert 0.45 <= waited_s < 1.5
    assert match(scheduler, 2) == 0
    assert time.monotonic() - start_s < waited_s + 0.3, "nobody else waits for it"
    assert (cache.asked.count("lease"), cache.num_deadline_misses) == (1, 2)
    gate.open()
    awaited(lambda: scheduler._matcher._last is not None and scheduler._matcher._last.has_ended)
    awaited(lambda: not cache.leases)
    assert match(scheduler, 3) > 0
    assert scheduler.connector_faults == 0
    scheduler.close()


def test_without_a_wait_for_tiers_the_owner_has_a_moment() -> None:
    cache, gate = ScriptedCache(num_here=5), Gate()
    cache.on_lease = gate
    scheduler = SharedCacheScheduler(cache, SIZE, MatchRule(staged_ahead=False))
    start_s = time.monotonic()
    assert match(scheduler) == 0
    assert OWNER_WAIT_S * 0.9 <= time.monotonic() - start_s < OWNER_WAIT_S + 1.0
    gate.open()
    awaited(lambda: cache.asked and not cache.leases)
    scheduler.close()


def test_an_error_of_a_look_up_is_no_match_and_is_counted() -> None:
    cache = ScriptedCache(num_here=5)

    def fail() -> None:
        raise RuntimeError("a fault")

    cache.on_lease = fail
    scheduler = SharedCacheScheduler(cache, SIZE, MatchRule(staged_ahead=False))
    assert match(scheduler) == 0
    assert (scheduler.connector_faults, scheduler.num_tracked_requests) == (1, 1)
    cache.on_lease = lambda: None
    assert match(scheduler) == 5 * SIZE
    scheduler.close()
    assert match(scheduler, 2) == 0  # closed: nothing is looked up
    assert scheduler.connector_faults == 1


def test_a_real_match_brings_from_the_store_what_arrives_in_time() -> None:
    store = ScriptedStore()
    writer, cache = make_cache(store), make_cache(store)
    save_blocks(writer, chain(7), 0, 7)
    assert writer.flush(WAIT_S)
    gate = Gate()
    hashes = block_hashes(TOKENS, LAYOUT.tokens_per_block)
    store.on_read = lambda asked: gate() if hashes[4] in asked else None
    rule = MatchRule(staged_ahead=False, wait_s=0.2)
    scheduler = SharedCacheScheduler(cache, SIZE, rule)
    start_s = time.monotonic()
    num_matched = match(scheduler)
    assert time.monotonic() - start_s < 2.0
    assert num_matched < 7 * SIZE
    gate.open()
    awaited(lambda: match(scheduler, 2) == 7 * SIZE)
    assert scheduler.connector_faults == 0
    scheduler.close()
    for one in (writer, cache):
        one.close()


def test_all_requests_of_a_turn_share_the_time_and_the_next_turn_has_it_again() -> None:
    """A store that always takes all of it; once it is used up, host memory alone is asked."""
    cache = ScriptedCache(num_here=2)
    cache.num_stored = 7
    cache.on_grow = lambda: time.sleep(0.08)
    scheduler = SharedCacheScheduler(cache, SIZE, MatchRule(staged_ahead=False, wait_s=0.1))
    for _ in range(2):
        cache.asked.clear()
        start_s = time.monotonic()
        found = [match(scheduler, id_) for id_ in range(64)]
        assert time.monotonic() - start_s < 1.0, "each 80 ms would be 5 s"
        assert cache.asked.count("grow") in (1, 2)
        assert cache.asked.count("lease") >= 32
        assert found.count(2 * SIZE) >= 32, "what is here is found all the same"
        scheduler.build_connector_meta(SchedulerOutput())
    scheduler.close()


def test_an_owner_that_is_slow_to_answer_holds_up_a_turn_only_so_long() -> None:
    cache = ScriptedCache(num_here=2)
    cache.on_lease = lambda: time.sleep(OWNER_WAIT_S * 0.8)
    scheduler = SharedCacheScheduler(cache, SIZE, MatchRule(staged_ahead=False))
    start_s = time.monotonic()
    found = [match(scheduler, id_) for id_ in range(64)]
    assert time.monotonic() - start_s < OWNER_TURN_S + 1.0
    assert found[-1] == 0
    scheduler.build_connector_meta(SchedulerOutput())
    awaited(lambda: scheduler._matcher._last is not None and scheduler._matcher._last.has_ended)
    cache.on_lease = lambda: None
    assert match(scheduler, 99) == 2 * SIZE
    scheduler.close()
