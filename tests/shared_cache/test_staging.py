"""Staging against stores that work, lie, fail, crawl and hang."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

from shared_cache.errors import StoreUnavailableError
from shared_cache.fetch_state import Ticket
from shared_cache.hashing import DEFAULT_SCOPE
from shared_cache.pieces import BLOCKS_PER_PIECE
from shared_cache.staging import SharedCache, StagedPrefix
from shared_cache.stores.fs_store import open_store
from tests.shared_cache.fakes import (
    BLOCK_BYTES,
    NAMESPACE,
    WAIT_S,
    FakeClock,
    Gate,
    ScriptedStore,
    chain_of,
    fill_host,
    make_cache,
    num_in_host,
    payload_of,
    run_of,
)

CHAIN = chain_of(20)
HASHES = CHAIN.hashes


@pytest.fixture
def store() -> ScriptedStore:
    store = ScriptedStore()
    store.write(run_of(CHAIN))
    return store


def check(cache: SharedCache, staged: StagedPrefix, num_blocks: int, other_leases: int = 0) -> None:
    """The staged blocks are there, right, and unleased after release, which works twice."""
    assert staged.num_blocks == num_blocks
    for slot, block_hash in zip(staged.lease.slots, HASHES, strict=False):
        assert bytes(cache.host.buffer(slot)) == payload_of(block_hash)
    cache.release(staged)
    cache.release(staged)
    assert cache.host.stats().leased_slots == other_leases


def test_blocks_of_the_store_are_staged_and_then_live_in_host_memory(store: ScriptedStore) -> None:
    cache = make_cache(store)
    first = cache.stage(HASHES)
    assert first.fetched == frozenset(range(20))
    check(cache, first, 20)
    second = cache.stage(HASHES)
    assert second.fetched == frozenset()
    check(cache, second, 20)
    stats = cache.stats()
    assert (stats.staged_blocks, stats.fetched_blocks) == (40, 20)
    assert stats.fetched_bytes == 20 * BLOCK_BYTES
    assert stats.fetch_s > 0
    assert (stats.store_faults, stats.deadline_misses) == (0, 0)
    cache.close()


def test_only_what_host_memory_lacks_is_fetched(store: ScriptedStore) -> None:
    cache = make_cache(store)
    fill_host(cache, HASHES[:5])
    staged = cache.stage(HASHES)
    assert staged.fetched == frozenset(range(5, 20))
    assert not any(store.num_reads[h] for h in HASHES[:5])
    check(cache, staged, 20)
    cache.close()


def test_blocks_that_host_memory_has_behind_a_gap_are_not_read_again(store: ScriptedStore) -> None:
    cache = make_cache(store)
    fill_host(cache, HASHES[BLOCKS_PER_PIECE:12])
    staged = cache.stage(HASHES)
    assert staged.fetched == frozenset({*range(BLOCKS_PER_PIECE), *range(12, 20)})
    assert not any(store.num_reads[h] for h in HASHES[BLOCKS_PER_PIECE:12])
    check(cache, staged, 20)
    cache.close()


def test_the_tail_of_a_run_is_found_by_who_never_saw_the_run(tmp_path: Path) -> None:
    """Another process wrote all blocks as one object, which is named by the first of them."""
    writer = open_store(f"file://{tmp_path}", NAMESPACE, {})
    writer.write(run_of(CHAIN))
    cache = make_cache(open_store(f"file://{tmp_path}", NAMESPACE, {}))
    fill_host(cache, HASHES[:5])
    staged = cache.stage(HASHES)
    assert staged.fetched == frozenset(range(5, 20))
    check(cache, staged, 20)
    cache.close()


def test_a_long_run_is_read_while_the_rest_of_it_is_looked_for(
    store: ScriptedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared_cache.fetching.FIRST_LOOK_UP_BYTES", 5 * BLOCK_BYTES)
    rest, first_read = Gate(), threading.Event()
    store.on_match = lambda hashes: rest() if len(hashes) > 5 else None
    store.on_read = lambda hashes: first_read.set()
    cache = make_cache(store)
    with ThreadPoolExecutor(1) as pool:
        staging = pool.submit(cache.stage, HASHES)
        rest.wait_entered()
        assert first_read.wait(WAIT_S)
        rest.open()
        check(cache, staging.result(WAIT_S), 20)
    assert set(store.num_reads.values()) == {1}
    cache.close()


@pytest.mark.parametrize(
    ("num_stored", "growth", "num_look_ups"),
    [(0, 8, 1), (3, 8, 1), (5, 8, 2), (12, 8, 2), (7, 1, 2), (12, 1, 3), (15, 1, 4), (18, 1, 4)],
)
def test_of_a_long_run_what_is_stored_is_read_and_nothing_else(
    num_stored: int,
    growth: int,
    num_look_ups: int,
    store: ScriptedStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shared_cache.fetching.FIRST_LOOK_UP_BYTES", 5 * BLOCK_BYTES)
    monkeypatch.setattr("shared_cache.fetching.LOOK_UP_GROWTH", growth)
    store.delete(HASHES[num_stored].hex())
    cache = make_cache(store)
    check(cache, cache.stage(HASHES), num_stored)
    assert set(store.num_reads) == set(HASHES[:num_stored])
    assert store.num_matches == num_look_ups
    cache.close()


def test_nobody_waits_for_a_run_whose_first_part_could_not_be_decided(
    store: ScriptedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared_cache.fetching.FIRST_LOOK_UP_BYTES", 5 * BLOCK_BYTES)
    cache = make_cache(store)
    monkeypatch.setattr(cache.gate, "blocks_to_load", Mock(side_effect=ZeroDivisionError))
    began_s = time.monotonic()
    assert cache.stage(HASHES).num_blocks == 0
    assert time.monotonic() - began_s < WAIT_S / 2
    cache.close()


def test_a_tail_that_is_stored_without_its_beginning_is_found(store: ScriptedStore) -> None:
    cache = make_cache(store)
    fill_host(cache, HASHES[:5])
    store.delete(HASHES[2].hex())
    staged = cache.stage(HASHES)
    assert staged.fetched == frozenset(range(5, 20))
    check(cache, staged, 20)
    cache.close()


def test_blocks_behind_the_devices_are_staged_without_their_beginning(store: ScriptedStore) -> None:
    """The engine has blocks 0 to 4, host memory has 5 to 7: the rest comes, nothing before."""
    cache = make_cache(store)
    fill_host(cache, HASHES[5:8])
    held = cache.lease(HASHES, first=5)
    assert (held.num_blocks, held.end) == (3, 8)
    assert cache.can_fetch(HASHES, held.end)
    staged = cache.grow(held, HASHES)
    assert (staged.first, staged.num_blocks, staged.end) == (5, 15, 20)
    assert staged.fetched == frozenset(range(8, 20))
    assert set(store.num_reads) == set(HASHES[8:])
    for slot, block_hash in zip(staged.lease.slots, HASHES[5:], strict=True):
        assert bytes(cache.host.buffer(slot)) == payload_of(block_hash)
    assert cache.stats().staged_blocks == 15
    cache.release(staged)
    assert cache.stats().host.leased_slots == 0
    cache.close()


def test_a_lease_asks_no_store_and_nothing_can_come_without_one(store: ScriptedStore) -> None:
    cache = make_cache(store)
    check(cache, cache.lease(HASHES), 0)
    assert store.num_matches == 0
    assert not cache.can_fetch(HASHES, 20)
    cache.close()
    alone = make_cache(None)
    assert not alone.can_fetch(HASHES, 0)
    alone.close()


def test_a_prefix_ends_where_the_store_ends(store: ScriptedStore) -> None:
    cache = make_cache(store)
    longer = chain_of(30)
    check(cache, cache.stage(longer.hashes), 20)
    check(cache, cache.stage(chain_of(3, first_token=999).hashes), 0)
    assert cache.stats().host.reserved_slots == 0
    cache.close()


def test_without_a_store_only_host_memory_counts() -> None:
    cache = make_cache(None)
    fill_host(cache, HASHES[:7])
    check(cache, cache.stage(HASHES), 7)
    assert cache.flush(0)
    cache.close()


@pytest.mark.parametrize("num_good", [0, 3])
def test_a_store_that_promises_what_it_cannot_read_gives_a_shorter_prefix(
    store: ScriptedStore, num_good: int
) -> None:
    """The corrupt object: found at look-up, cut short when read; the second piece here."""
    store.on_match = lambda hashes: len(HASHES)
    store.delete(HASHES[BLOCKS_PER_PIECE + num_good].hex())
    cache = make_cache(store, io_threads=1)
    check(cache, cache.stage(HASHES), BLOCKS_PER_PIECE + num_good)
    assert cache.stats().host.reserved_slots == 0
    assert store.num_reads[HASHES[2 * BLOCKS_PER_PIECE]] == 0  # of no use without the others
    cache.close()


def test_a_store_that_claims_more_than_was_asked_for_is_not_believed(
    store: ScriptedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_into = store.read_into
    monkeypatch.setattr(store, "read_into", lambda *args: (*read_into(*args), 1, 2, 3))
    store.on_match = lambda hashes: 10**9
    cache = make_cache(store)
    check(cache, cache.stage(HASHES), 20)
    assert cache.stats().store_faults == 0
    cache.close()


@pytest.mark.parametrize("error", [StoreUnavailableError("gone"), OSError("anything")])
def test_a_store_that_fails_at_look_up_is_a_miss(store: ScriptedStore, error: Exception) -> None:
    def fail(_: object) -> None:
        raise error

    store.on_match = fail
    cache = make_cache(store)
    check(cache, cache.stage(HASHES), 0)
    assert cache.stats().store_faults == 1
    cache.close()


def test_a_store_that_fails_midway_gives_what_came_before(store: ScriptedStore) -> None:
    def fail_late(hashes: object) -> None:
        if HASHES[BLOCKS_PER_PIECE] in hashes:  # type: ignore[operator]
            raise StoreUnavailableError("gone midway")

    store.on_read = fail_late
    cache = make_cache(store, io_threads=1)
    staged = cache.stage(HASHES)
    assert staged.fetched == frozenset(range(BLOCKS_PER_PIECE))
    check(cache, staged, BLOCKS_PER_PIECE)
    cache.close()


def test_what_is_coming_is_leased_as_it_comes_and_counted_once(store: ScriptedStore) -> None:
    cache, gate = make_cache(store), Gate()
    store.on_read = lambda hashes: gate() if HASHES[-1] in hashes else None
    with ThreadPoolExecutor(2) as threads:
        whole = threads.submit(cache.stage, HASHES)
        gate.wait_entered()
        one = cache.lease_coming(HASHES[:BLOCKS_PER_PIECE], 0, 3, DEFAULT_SCOPE, WAIT_S)
        assert one.num_blocks == BLOCKS_PER_PIECE, "all that is here, and no more than asked for"
        cache.release(one)
        second = cache.lease_coming(HASHES, 0, BLOCKS_PER_PIECE + 1, DEFAULT_SCOPE, WAIT_S)
        cache.release(second)
        part = cache.lease_coming(HASHES, 1, 3, DEFAULT_SCOPE, WAIT_S)
        assert (part.first, part.end) == (1, 2 * BLOCKS_PER_PIECE), "more than was waited for"
        later = threads.submit(cache.lease_coming, HASHES[:-1], 3, 19, DEFAULT_SCOPE, WAIT_S)
        gate.open()
        assert later.result(WAIT_S).end == len(HASHES) - 1
        check(cache, whole.result(WAIT_S), len(HASHES), other_leases=18)
    cache.release(part)
    cache.release(later.result())
    stats = cache.stats()
    assert (stats.staged_blocks, stats.host.leased_slots, store.num_matches) == (20, 0, 1)


def test_who_waits_for_what_is_coming_does_not_wait_for_ever(store: ScriptedStore) -> None:
    cache, gate = make_cache(store), Gate()
    store.on_read = gate
    with ThreadPoolExecutor(1) as threads:
        whole = threads.submit(cache.stage, HASHES)
        gate.wait_entered()
        assert cache.lease_coming(HASHES, 0, 20, DEFAULT_SCOPE, 0.01).num_blocks == 0
        gate.open()
        cache.release(whole.result(WAIT_S))
    assert cache.stats().deadline_misses == 0


def test_what_nobody_fetches_is_not_asked_for(store: ScriptedStore) -> None:
    cache = make_cache(store)
    assert cache.lease_coming(HASHES, 0, 20, DEFAULT_SCOPE, WAIT_S).num_blocks == 0
    staged = cache.stage(HASHES[:8])
    held = cache.lease_coming(HASHES, 2, 20, DEFAULT_SCOPE, WAIT_S)
    assert (held.first, held.end) == (2, 8)
    cache.release(held)
    cache.release(staged)
    assert store.num_matches == 1


def test_a_dead_store_is_asked_again_only_after_a_growing_pause(store: ScriptedStore) -> None:
    clock = FakeClock()

    def fail(_: object) -> None:
        raise StoreUnavailableError("gone")

    store.on_match = fail
    cache = make_cache(store, clock=clock)
    for pause_s in (1, 2, 4):
        asked = store.num_matches
        for _ in range(10):
            check(cache, cache.stage(HASHES), 0)
        assert store.num_matches == asked + 1
        clock.now_s += pause_s
    store.on_match = lambda hashes: None
    check(cache, cache.stage(HASHES), 20)
    cache.close()


def test_a_slow_store_gives_in_time_what_has_arrived_and_the_rest_later(
    store: ScriptedStore,
) -> None:
    """The second piece hangs: the first is staged at the deadline, all of it once it arrives."""
    late = Gate()
    store.on_read = lambda hashes: None if HASHES[0] in hashes else late()
    cache = make_cache(store, io_threads=1)
    cache.release(cache.stage(HASHES[:BLOCKS_PER_PIECE]))
    in_time = cache.stage(HASHES, deadline_s=0.05)
    assert in_time.num_blocks == BLOCKS_PER_PIECE
    assert cache.stats().deadline_misses == 1
    late.open()
    check(cache, cache.stage(HASHES), 20, other_leases=BLOCKS_PER_PIECE)
    assert set(store.num_reads.values()) == {1}
    check(cache, in_time, BLOCKS_PER_PIECE)
    cache.close()


def test_deadline_zero_returns_at_once_but_starts_the_fetch(store: ScriptedStore) -> None:
    gate = Gate()
    store.on_match = gate
    cache = make_cache(store)
    check(cache, cache.stage(HASHES, deadline_s=0), 0)
    gate.wait_entered()
    gate.open()
    check(cache, cache.stage(HASHES), 20)
    assert store.num_matches == 1
    cache.close()


def test_a_hanging_store_costs_a_deadline_and_then_nothing(store: ScriptedStore) -> None:
    clock, gate = FakeClock(), Gate()
    store.on_match = gate
    cache = make_cache(store, clock=clock, tier={"timeout_s": 30}, io_threads=1)
    check(cache, cache.stage(HASHES, deadline_s=0.02), 0)
    gate.wait_entered()
    clock.now_s += 30
    check(cache, cache.stage(HASHES, deadline_s=3600), 0)
    assert cache.stats().store_faults == 1
    gate.open()
    cache.close()


def test_concurrent_requests_fetch_each_block_once(
    store: ScriptedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five requests join while the first look-up is held; prefixes differ in length and tail."""
    store.on_match = gate = Gate()
    cache = make_cache(store, num_slots=200)
    waiting = signal_waits(cache, monkeypatch)
    with ThreadPoolExecutor(5) as pool:
        prefixes = [HASHES] + [chain_of(18 + extra).hashes for extra in range(4)]
        futures = [pool.submit(cache.stage, prefix) for prefix in prefixes]
        for _ in futures:
            assert waiting.acquire(timeout=WAIT_S)
        gate.open()
        results = [future.result(WAIT_S) for future in futures]
    assert [result.num_blocks for result in results] == [20, 18, 19, 20, 20]
    assert {h: store.num_reads[h] for h in HASHES} == dict.fromkeys(HASHES, 1)
    for result in results:
        assert result.fetched == frozenset(range(result.num_blocks))
        cache.release(result)
    assert cache.stats().host.leased_slots == 0
    cache.close()


def test_who_waits_for_anothers_fetch_needs_only_its_own_blocks(
    store: ScriptedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second request goes on when its three blocks are there, long before the first's."""
    late = Gate()
    store.on_read = lambda hashes: None if HASHES[0] in hashes else late()
    store.on_match = early = Gate()
    cache = make_cache(store, io_threads=1)
    waiting = signal_waits(cache, monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(cache.stage, HASHES)
        assert waiting.acquire(timeout=WAIT_S)
        short = pool.submit(cache.stage, HASHES[:3])
        assert waiting.acquire(timeout=WAIT_S)
        early.open()
        assert short.result(WAIT_S).fetched == frozenset(range(3))
        assert not long.done()
        late.open()
        assert long.result(WAIT_S).fetched == frozenset(range(20))
    cache.close()


def test_a_gap_in_anothers_fetch_ends_the_wait(
    store: ScriptedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request's run breaks off; the second's own tail is hanging, and of no use now."""
    first, second, longer = Gate(), Gate(), chain_of(30).hashes
    store.delete(HASHES[5].hex())
    store.on_match = lambda hashes: first() if len(hashes) == len(HASHES) else second()
    cache = make_cache(store, staging_deadline_s=3600)
    waiting = signal_waits(cache, monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(cache.stage, HASHES)
        assert waiting.acquire(timeout=WAIT_S)
        other = pool.submit(cache.stage, longer)
        assert waiting.acquire(timeout=WAIT_S)
        second.wait_entered()
        first.open()
        assert other.result(WAIT_S).num_blocks == one.result(WAIT_S).num_blocks == 5
        second.open()
    cache.close()


def test_nothing_is_evicted_between_arrival_and_lease(
    store: ScriptedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody wants all of host memory at the very moment when the last block has arrived."""
    cache = make_cache(store)
    fetcher = cache._fetcher
    assert fetcher is not None
    wait = fetcher.wait

    def wait_and_squeeze(tickets: Sequence[Ticket], deadline_s: float) -> bool:
        is_decided = wait(tickets, deadline_s)
        cache.host.cancel(cache.host.reserve(64))
        return is_decided

    monkeypatch.setattr(fetcher, "wait", wait_and_squeeze)
    fill_host(cache, HASHES[:3])
    check(cache, cache.stage(HASHES), 20)
    cache.close()


def test_a_prefix_larger_than_host_memory_is_staged_as_far_as_it_fits(
    store: ScriptedStore,
) -> None:
    cache = make_cache(store, num_slots=10)
    staged = cache.stage(HASHES)
    check(cache, staged, 10)
    cache.close()


def test_staging_evicts_nothing_that_another_request_holds(store: ScriptedStore) -> None:
    cache = make_cache(store, num_slots=12)
    other = chain_of(8, first_token=5000)
    fill_host(cache, other.hashes)
    held = cache.host.lease(other.hashes)
    staged = cache.stage(HASHES)
    assert staged.num_blocks == 4
    assert num_in_host(cache, other.hashes) == 8
    cache.host.release(held)
    check(cache, staged, 4)
    cache.close()


def test_many_threads_stage_and_save_at_once_and_never_see_a_wrong_block() -> None:
    """Small host memory, so that everything is evicted and fetched all the time."""
    store = ScriptedStore()
    chains = [chain_of(12, first_token=1000 * i) for i in range(6)]
    for chain in chains:
        store.write(run_of(chain))
    cache = make_cache(store, num_slots=30, io_threads=3)
    wrong: list[int] = []

    def client(seed: int) -> None:
        for turn in range(25):
            chain = chains[(seed + turn * (seed + 1)) % len(chains)]
            staged = cache.stage(chain.hashes)
            for slot, block_hash in zip(staged.lease.slots, chain.hashes, strict=False):
                if bytes(cache.host.buffer(slot)) != payload_of(block_hash):
                    wrong.append(slot)
            cache.release(staged)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(client, range(4)))
    assert not wrong
    cache.close()
    stats = cache.stats().host
    assert (stats.leased_slots, stats.reserved_slots) == (0, 0)
    assert stats.evicted_blocks > 0


def test_closing_wakes_who_waits_and_closes_the_store(store: ScriptedStore) -> None:
    gate = Gate()
    store.on_match = gate
    cache = make_cache(store, staging_deadline_s=3600)
    with ThreadPoolExecutor(2) as pool:
        staged = pool.submit(cache.stage, HASHES)
        gate.wait_entered()
        closing = pool.submit(cache.close)
        assert staged.result(WAIT_S).num_blocks == 0
        gate.open()
        closing.result(WAIT_S)
    cache.close()
    assert store.is_closed
    check(cache, cache.stage(HASHES), 0)


def signal_waits(cache: SharedCache, monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """A semaphore that is released whenever a request has joined its fetches and begins to wait."""
    fetcher, waiting = cache._fetcher, threading.Semaphore(0)
    assert fetcher is not None
    wait = fetcher.wait

    def signal_and_wait(tickets: Sequence[Ticket], deadline_s: float) -> bool:
        waiting.release()
        return wait(tickets, deadline_s)

    monkeypatch.setattr(fetcher, "wait", signal_and_wait)
    return waiting
