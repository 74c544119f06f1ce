"""The cost gate at work: what would arrive later than it is computed is not fetched."""

import time

from shared_cache.pieces import BLOCKS_PER_PIECE
from tests.shared_cache.fakes import (
    BLOCK_BYTES,
    LAYOUT,
    WAIT_S,
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
