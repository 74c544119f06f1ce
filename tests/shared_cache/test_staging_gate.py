"""The cost gate at work: what would arrive later than it is computed is not fetched."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from shared_cache.pieces import BLOCKS_PER_PIECE
from shared_cache.staging import SharedCache
from shared_cache.tier_speeds import PROBE_AFTER_DECISIONS
from tests.shared_cache.fakes import (
    BLOCK_BYTES,
    LAYOUT,
    WAIT_S,
    Gate,
    ScriptedStore,
    chain_of,
    make_cache,
    payload_of,
    run_of,
    save_blocks,
)

CHAIN = chain_of(20)
HASHES = CHAIN.hashes
ON = {"gate": True}
URL = "memory://0"
FAR_URL = "memory://1"
PIECE_BYTES = BLOCKS_PER_PIECE * BLOCK_BYTES


def stored() -> ScriptedStore:
    store = ScriptedStore()
    store.write(run_of(CHAIN))
    return store


def teach(cache, piece_s: float, token_s: float) -> None:  # type: ignore[no-untyped-def]
    """Let the gate know a tier and an engine."""
    for num_tokens in (16, 32, 64, 80):
        cache.gate.saw_prefill([(0, num_tokens)], num_tokens * token_s)
    for _ in range(8):
        cache.gate.saw_fetch(URL, PIECE_BYTES, piece_s, 1)


def test_what_is_not_known_yet_is_loaded_and_measured() -> None:
    cache = make_cache(stored(), cost=ON)
    staged = cache.stage(HASHES)
    assert staged.num_blocks == 20
    gate = cache.stats().gate
    assert gate is not None
    assert (gate.loads, gate.untested) == (1, 1)
    assert gate.tiers[URL].num_samples == 3
    cache.release(staged)
    cache.close()


def test_a_slow_tier_is_left_alone_when_the_engine_is_faster() -> None:
    store = stored()
    cache = make_cache(store, cost=ON)
    teach(cache, piece_s=5.0, token_s=1e-4)
    start_s = time.monotonic()
    staged = cache.stage(HASHES)
    assert time.monotonic() - start_s < 2
    assert staged.num_blocks == 0
    assert sum(store.num_reads.values()) <= BLOCKS_PER_PIECE, "a probe at most"
    stats = cache.stats()
    assert stats.gate is not None
    assert (stats.gate.computes, stats.deadline_misses, stats.store_faults) == (1, 0, 0)
    cache.close()


def test_a_fast_tier_is_loaded_from_and_the_prediction_is_checked() -> None:
    cache = make_cache(stored(), cost=ON)
    teach(cache, piece_s=1e-4, token_s=1.0)
    staged = cache.stage(HASHES)
    assert staged.num_blocks == 20
    gate = cache.stats().gate
    assert gate is not None
    assert gate.loads == 1
    assert gate.fetch_error is not None
    cache.release(staged)
    cache.close()


def test_the_head_is_loaded_when_the_whole_would_be_late() -> None:
    """Each piece takes as long as half of its tokens: the deadline is what ends the load."""
    cache = make_cache(stored(), cost=ON, io_threads=1)
    piece_tokens = BLOCKS_PER_PIECE * LAYOUT.tokens_per_block
    teach(cache, piece_s=2.0, token_s=4.0 / piece_tokens)
    staged = cache.stage(HASHES, deadline_s=3.0)
    assert staged.num_blocks == BLOCKS_PER_PIECE
    for slot, block_hash in zip(staged.lease.slots, HASHES, strict=False):
        assert bytes(cache.host.buffer(slot)) == payload_of(block_hash)
    gate = cache.stats().gate
    assert gate is not None
    assert gate.splits == 1
    cache.release(staged)
    cache.close()


def test_blocks_that_are_sooner_computed_than_loaded_are_not_worth_writing() -> None:
    store = ScriptedStore()
    cache = make_cache(store, cost=ON, tier={"admission": "worth"})
    save_blocks(cache, CHAIN, 0, 4)
    assert cache.flush(WAIT_S)
    assert store.match(HASHES) == 4, "nothing is known yet"
    teach(cache, piece_s=5.0, token_s=1e-4)
    save_blocks(cache, CHAIN, 4, 8)
    assert cache.flush(WAIT_S)
    assert store.match(HASHES) == 4
    stats = cache.stats()
    assert (stats.tiers[0].declined_blocks, stats.dropped_saves) == (4, 0)
    assert (stats.host.leased_slots, stats.host.used_slots) == (0, 8)
    cache.close()


def test_fetching_keeps_to_its_bandwidth() -> None:
    limit = {"gate": False, "max_fetch_bytes_per_s": 2 * PIECE_BYTES}
    cache = make_cache(stored(), cost=limit)
    start_s = time.monotonic()
    staged = cache.stage(HASHES)
    assert staged.num_blocks == 20
    assert time.monotonic() - start_s > 0.5
    cache.release(staged)
    cache.close()


def test_the_bandwidth_is_part_of_what_loading_costs() -> None:
    """20 blocks take 0.8 s to compute and 2.5 s at this bandwidth, however fast the tier is."""
    limit = {"gate": True, "max_fetch_bytes_per_s": PIECE_BYTES}
    cache = make_cache(stored(), cost=limit)
    teach(cache, piece_s=1e-4, token_s=0.01)
    staged = cache.stage(HASHES)
    assert staged.num_blocks == 0
    stats = cache.stats()
    assert stats.gate is not None
    assert (stats.gate.computes, stats.deadline_misses) == (1, 0)
    cache.close()


def test_who_waits_for_bandwidth_has_claimed_nothing() -> None:
    limit = {"gate": False, "max_fetch_bytes_per_s": PIECE_BYTES // 4}
    cache = make_cache(stored(), cost=limit, io_threads=2)
    staged = cache.stage(HASHES, deadline_s=0.5)
    assert staged.num_blocks == BLOCKS_PER_PIECE, "the first piece goes at once, the next in 4 s"
    assert cache.host.stats().reserved_slots == 0
    cache.release(staged)
    cache.close()


def test_a_near_head_that_is_not_worth_it_does_not_hide_the_far_rest() -> None:
    near, far = ScriptedStore(), stored()
    near.write(run_of(chain_of(1)))
    cache = make_cache(near, far, cost=ON)
    teach(cache, piece_s=0.1, token_s=0.01)
    for url in (URL, FAR_URL):
        for _ in range(8):  # latency alone: one block takes as long as a piece
            cache.gate.saw_fetch(url, BLOCK_BYTES, 0.1, 1)
            cache.gate.saw_fetch(url, PIECE_BYTES, 0.1, 1)
    staged = cache.stage(HASHES)
    assert staged.num_blocks == 20
    cache.release(staged)
    cache.close()


def test_a_tier_that_is_slow_to_say_what_it_has_is_not_waited_for() -> None:
    """The answer takes longer than computing it all would; it is measured again all the same."""
    store, answers = stored(), Gate()
    cache = make_cache(store, cost=ON)
    teach(cache, piece_s=1e-4, token_s=1e-5)
    for _ in range(4):
        cache.gate.saw_look_up(URL, 1.0)
    store.on_match = answers
    for _ in range(PROBE_AFTER_DECISIONS + 1):
        assert cache.stage(HASHES).num_blocks == 0
    answers.wait_entered()
    assert store.num_matches == 1
    assert cache.stats().deadline_misses == 0
    answers.open()
    cache.close()


def test_a_tier_that_became_quick_to_answer_is_waited_for_again() -> None:
    cache = make_cache(stored(), cost=ON)
    teach(cache, piece_s=1e-4, token_s=1e-2)
    for _ in range(4):
        cache.gate.saw_look_up(URL, 10.0)
    for _ in range(9 * PROBE_AFTER_DECISIONS):
        staged = cache.stage(HASHES)
        if staged.num_blocks:
            break
        await_users(cache, 0)
    assert staged.num_blocks == 20
    cache.release(staged)
    cache.close()


def staged_beside(cache: SharedCache, hold: Gate, first_s: float, later_s: float) -> list[int]:
    """How much two requests get, the second one beginning when the first one is held by a store."""
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.stage, HASHES, first_s)
        hold.wait_entered()
        later = pool.submit(cache.stage, HASHES, later_s)
        await_users(cache, 2)
        hold.open()
        staged = [first.result(WAIT_S), later.result(WAIT_S)]
    for one in staged:
        cache.release(one)
    return [one.num_blocks for one in staged]


def await_users(cache: SharedCache, num_users: int) -> None:
    """Wait until so many requests are interested in what is on its way; 0: until nothing is."""
    pause = threading.Event()
    while fetches := cache._fetcher._in_flight.all():
        if num_users and sum(fetch.num_users for fetch in fetches) >= num_users:
            break
        pause.wait(0.001)


def test_who_joins_with_more_time_is_decided_for_too() -> None:
    store, hold = stored(), Gate()
    store.on_match = hold
    cache = make_cache(store, cost=ON, io_threads=1)
    piece_tokens = BLOCKS_PER_PIECE * LAYOUT.tokens_per_block
    teach(cache, piece_s=2.0, token_s=4.0 / piece_tokens)
    _, num_later = staged_beside(cache, hold, 1.0, 100.0)
    assert num_later == 20
    cache.close()


def test_who_comes_after_the_decision_with_more_time_gets_more() -> None:
    store, hold = stored(), Gate()
    store.on_read = hold
    cache = make_cache(store, cost=ON, io_threads=1)
    piece_tokens = BLOCKS_PER_PIECE * LAYOUT.tokens_per_block
    teach(cache, piece_s=2.0, token_s=4.0 / piece_tokens)
    _, num_later = staged_beside(cache, hold, 3.0, 100.0)
    assert num_later == 20
    stats = cache.stats().gate
    assert stats is not None
    assert (stats.splits, stats.loads) == (1, 1)
    cache.close()


def test_nobody_waits_for_a_read_that_was_given_up_while_its_tier_answers_others() -> None:
    store, hold = stored(), Gate()
    store.on_read = hold
    cache = make_cache(store, io_threads=1, staging_deadline_s=1)
    assert cache.stage(HASHES, deadline_s=0.1).num_blocks == 0
    hold.wait_entered()
    store.on_read = lambda hashes: None
    tier = cache._tiers.tiers[0]
    (stuck,) = tier.threads.crew.threads
    tier.threads.crew.replace(stuck)
    staged = cache.stage(HASHES, deadline_s=WAIT_S)
    assert staged.num_blocks == 20
    hold.open()
    cache.release(staged)
    cache.close()
