"""Saves: in the background, bounded, dropped under pressure, never in the engine's way."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from shared_cache.config import CacheConfig
from shared_cache.errors import (
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
    StoreUnavailableError,
)
from shared_cache.faults import REFUSED_PAUSE_S, FaultLog
from shared_cache.hashing import BlockHashChain
from shared_cache.host.interface import HostTier, NewRun
from shared_cache.save_jobs import MERGED_BLOCKS
from shared_cache.saving import (
    MAX_SETBACKS,
    MAX_THREADS,
    PAUSE_POLL_S,
    SaveCounts,
    SaveQueue,
)
from shared_cache.stores.store import BlockRun
from shared_cache.tiers import TieredStore
from tests.shared_cache.fakes import (
    BLOCK_BYTES,
    WAIT_S,
    FakeClock,
    Gate,
    ScriptedStore,
    await_published,
    chain_of,
    make_cache,
    make_host,
    num_in_host,
    payload_of,
)
from tests.shared_cache.fakes import save_blocks as save

CHAIN = chain_of(6)


def test_saved_blocks_reach_host_memory_and_the_store_soon() -> None:
    store = ScriptedStore()
    cache = make_cache(store)
    save(cache, CHAIN, 0, 2)
    save(cache, CHAIN, 2, 6)
    assert cache.flush(WAIT_S)
    assert num_in_host(cache, CHAIN.hashes) == 6
    buffers = [memoryview(bytearray(BLOCK_BYTES)) for _ in CHAIN.hashes]
    assert len(store.read_into(CHAIN.hashes, buffers)) == 6
    assert [bytes(b) for b in buffers] == [payload_of(h) for h in CHAIN.hashes]
    assert sorted(entry.parent for entry in store.entries()) == sorted(
        CHAIN.parent_of(i) for i in range(6)
    )
    stats = cache.stats()
    assert (stats.saved_blocks, stats.saved_bytes) == (6, 6 * BLOCK_BYTES)
    assert (stats.dropped_saves, stats.pending_saves, stats.host.leased_slots) == (0, 0, 0)
    cache.close()


def test_blocks_that_the_store_has_are_not_counted_as_saved() -> None:
    cache = make_cache(ScriptedStore())
    for _ in range(2):
        save(cache, CHAIN, 0, 6)
        assert cache.flush(WAIT_S)
    assert (cache.stats().saved_blocks, cache.stats().dropped_saves) == (6, 0)
    cache.close()


def test_a_full_queue_keeps_the_leading_blocks_and_drops_the_rest() -> None:
    store, gate = ScriptedStore(), Gate()
    store.on_write = gate
    cache = make_cache(store, save_queue_bytes=4 * BLOCK_BYTES)
    save(cache, CHAIN, 0, 6)
    gate.wait_entered()
    other = chain_of(3, first_token=500)
    save(cache, other, 0, 3)
    await_published(cache)
    stats = cache.stats()
    assert (stats.pending_saves, stats.dropped_saves) == (4, 2 + 3)
    assert num_in_host(cache, CHAIN.hashes) == 6
    assert num_in_host(cache, other.hashes) == 3
    assert not cache.flush(0.01)
    gate.open()
    assert cache.flush(WAIT_S)
    assert store.match(CHAIN.hashes) == 4
    assert cache.stats().host.leased_slots == 0
    cache.close()


def test_blocks_waiting_to_be_written_are_not_evicted() -> None:
    store, gate = ScriptedStore(), Gate()
    store.on_write = gate
    cache = make_cache(store, num_slots=12)
    save(cache, CHAIN, 0, 6)
    gate.wait_entered()
    slots = cache.reserve(12)
    assert len(slots) == 6
    assert cache.stats().dropped_saves == 6
    gate.open()
    assert not cache.flush(0.01), "what is being copied is not saved yet"
    cache.give_back(slots)
    assert cache.flush(WAIT_S)
    buffers = [memoryview(bytearray(BLOCK_BYTES)) for _ in CHAIN.hashes]
    assert len(store.read_into(CHAIN.hashes, buffers)) == 6
    assert [bytes(b) for b in buffers] == [payload_of(h) for h in CHAIN.hashes]
    cache.close()


def test_a_dead_store_cannot_pin_more_than_half_of_the_host_tier() -> None:
    store, clock = ScriptedStore(), FakeClock()
    store.on_write = away
    cache = make_cache(store, num_slots=12, clock=clock)
    for start in range(0, 40, 4):
        save(cache, chain_of(4, first_token=100 * start), 0, 4)
        await_published(cache)
        assert cache.stats().pending_saves == min(start + 4, 6)
        assert cache.stats().host.leased_slots <= 6
    assert cache.stats().dropped_saves == 40 - 6
    assert len(cache.reserve(12)) == 6
    cache.close()
    assert cache.stats().host.leased_slots == 0


def away(_: object) -> None:
    raise StoreUnavailableError("no route")


@pytest.mark.parametrize("error", [StoreFullError("no room"), StoreUnavailableError("no route")])
def test_saves_outlive_an_outage_in_the_queue(error: StoreError) -> None:
    store, clock = ScriptedStore(), FakeClock()
    has_failed = threading.Event()

    def fail(_: object) -> None:
        has_failed.set()
        raise error

    store.on_write = fail
    cache = make_cache(store, clock=clock)
    save(cache, CHAIN, 0, 2)
    assert has_failed.wait(WAIT_S)
    while cache.stats().store_faults == 0:  # the write that failed is about to be noted
        assert not cache.flush(0.01)
    for start in (2, 3, 4):
        save(cache, CHAIN, start, start + 1)
    assert not cache.flush(2 * PAUSE_POLL_S)
    stats = cache.stats()
    assert (stats.pending_saves, stats.dropped_saves, stats.saved_blocks) == (5, 0, 0)
    assert (stats.store_faults, store.num_writes) == (1, 1), "the pause is not over"
    unseen = chain_of(1, first_token=900)
    cache.release(cache.stage(unseen.hashes))
    assert store.num_matches == 1, "reading goes on"
    store.on_write = lambda _: None
    clock.now_s += 1
    assert cache.flush(WAIT_S)
    stats = cache.stats()
    assert (stats.pending_saves, stats.dropped_saves, stats.saved_blocks) == (0, 0, 5)
    assert store.match(CHAIN.hashes) == 5
    assert stats.host.leased_slots == 0
    cache.close()


def test_a_run_that_alone_cannot_be_stored_is_dropped_and_holds_nobody_up() -> None:
    store, clock = ScriptedStore(), FakeClock()
    bad = chain_of(1, first_token=700)

    def refuse_one(run: BlockRun) -> None:
        if run.hashes[0] == bad.hashes[0]:
            raise StoreUnavailableError("EntityTooLarge")

    store.on_write = refuse_one
    cache = make_cache(store, clock=clock)
    save(cache, bad, 0, 1)
    num_saved = 0
    while cache.stats().dropped_saves == 0:
        assert num_saved < 2 * MAX_SETBACKS
        save(cache, chain_of(1, first_token=10_000 + 4 * num_saved), 0, 1)
        num_saved += 1
        while cache.stats().saved_blocks < num_saved:
            clock.now_s += 30
            cache.flush(0.02)
    assert (cache.stats().dropped_saves, cache.stats().saved_blocks) == (1, num_saved)
    assert cache.stats().host.leased_slots == 0
    cache.close()


def test_an_error_that_will_not_pass_is_not_tried_again() -> None:
    store = ScriptedStore()

    def fail(_: object) -> None:
        raise ValueError("a bug")

    store.on_write = fail
    cache = make_cache(store)
    save(cache, CHAIN, 0, 2)
    assert cache.flush(WAIT_S)
    assert (cache.stats().dropped_saves, store.num_writes) == (2, 1)
    cache.close()


def test_queued_runs_that_continue_each_other_are_written_as_one() -> None:
    chain, other = chain_of(70), chain_of(1, first_token=900)
    store, gate = ScriptedStore(), Gate()
    written: list[BlockRun] = []

    def hold(run: BlockRun) -> None:
        written.append(run)
        gate()

    store.on_write = hold
    host = make_host(200)
    with saving(host, store, num_threads=1) as queue:
        put(queue, host, other, 0, 1)
        gate.wait_entered()
        for start in range(70):
            put(queue, host, chain, start, start + 1)
        gate.open()
        assert queue.flush(WAIT_S)
        assert [len(run.hashes) for run in written] == [1, MERGED_BLOCKS, 70 - MERGED_BLOCKS]
        assert queue.counts == SaveCounts(saved=71, dropped=0, pending=0)
    assert store.match(chain.hashes) == 70
    buffers = [memoryview(bytearray(BLOCK_BYTES)) for _ in chain.hashes]
    assert len(store.read_into(chain.hashes, buffers)) == 70
    assert [bytes(b) for b in buffers] == [payload_of(h) for h in chain.hashes]
    assert host.stats().leased_slots == 0


def test_several_runs_are_written_at_once_but_never_two_of_one_beginning() -> None:
    """Two objects of one name would replace each other in an object store."""
    store, gate = ScriptedStore(), Gate()
    store.on_write = gate
    host = make_host()
    with saving(host, store, num_threads=9) as queue:
        for length in (3, 4):
            put(queue, host, chain_of(length), 0, length)
        put(queue, host, chain_of(2, first_token=300), 0, 2)
        for _ in range(2):
            gate.wait_entered()
        assert not queue.flush(0.05)
        assert store.num_writes == 2
        for index in range(4):
            put(queue, host, chain_of(2, first_token=1000 * index + 500), 0, 2)
        for _ in range(MAX_THREADS - 2):
            gate.wait_entered()
        assert not queue.flush(0.05)
        assert store.num_writes == MAX_THREADS
        gate.open()
        assert queue.flush(WAIT_S)
        assert queue.counts.saved == 4 + 2 + 4 * 2
    assert host.stats().leased_slots == 0


@contextmanager
def saving(host: HostTier, store: ScriptedStore, num_threads: int) -> Iterator[SaveQueue]:
    faults = FaultLog(logging.getLogger("test"))
    tiers = TieredStore([store], CacheConfig(store="memory://"), faults, time.monotonic)
    assert tiers.shared is not None
    queue = SaveQueue(host, tiers.shared, 1000, num_threads)
    try:
        yield queue
    finally:
        queue.close()
        tiers.close_threads()


def put(queue: SaveQueue, host: HostTier, chain: BlockHashChain, start: int, stop: int) -> None:
    hashes = chain.hashes[start:stop]
    slots = host.reserve(len(hashes))
    for slot, block_hash in zip(slots, hashes, strict=True):
        host.buffer(slot)[:] = payload_of(block_hash)
    lease = host.commit(slots, NewRun(chain.parent_of(start), tuple(hashes)))
    queue.put(lease, chain.parent_of(start), hashes)


def test_a_read_only_store_is_read_and_never_written() -> None:
    store = ScriptedStore()
    store.read_only = True
    cache = make_cache(store)
    save(cache, CHAIN, 0, 6)
    assert cache.flush(WAIT_S)
    assert store.num_writes == 0
    assert num_in_host(cache, CHAIN.hashes) == 6
    assert cache.stats().host.leased_slots == 0
    cache.close()


def test_a_store_that_refuses_to_be_written_is_tried_again_after_a_long_pause(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Rights come back: credentials expire, disks are mounted again."""
    store, clock = ScriptedStore(), FakeClock()

    def refuse(_: object) -> None:
        raise StoreReadOnlyError("no right to write")

    store.on_write = refuse
    cache = make_cache(store, clock=clock)
    for start in range(3):
        save(cache, CHAIN, start, start + 1)
        assert cache.flush(WAIT_S), "dropped at once meanwhile"
        clock.now_s += 10
    assert store.num_writes == 1
    assert cache.stats().dropped_saves == 3
    assert cache.stats().host.leased_slots == 0
    assert "cannot be written to for now" in caplog.text
    store.on_write = lambda run: None
    clock.now_s += REFUSED_PAUSE_S
    save(cache, CHAIN, 3, 6)
    assert cache.flush(WAIT_S)
    assert (cache.stats().saved_blocks, cache.stats().dropped_saves) == (3, 3)
    cache.close()


def test_closing_drops_what_is_queued_and_gives_all_leases_back() -> None:
    store, gate = ScriptedStore(), Gate()
    store.on_write = gate
    cache = make_cache(store)
    save(cache, CHAIN, 0, 1)
    gate.wait_entered()
    save(cache, CHAIN, 1, 6)
    gate.open()
    cache.close()
    cache.close()
    save(cache, chain_of(1, first_token=700), 0, 1)
    stats = cache.stats()
    assert stats.host.reserved_slots == 0
    assert stats.pending_saves == 0
    assert stats.saved_blocks + stats.dropped_saves == 7
    assert stats.host.leased_slots == 0


def test_a_process_that_forgets_to_close_ends_even_while_the_store_hangs() -> None:
    """The write never returns; the interpreter must end all the same, without a crash."""
    script = """
import threading
from tests.shared_cache.fakes import ScriptedStore, chain_of, make_cache, save_blocks
store = ScriptedStore()
entered = threading.Event()
def hang(_):
    entered.set()
    threading.Event().wait()
store.on_write = store.on_read = hang
cache = make_cache(store)
save_blocks(cache, chain_of(3), 0, 3)
assert entered.wait(10)
print("done")
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout.strip()) == (0, "done"), result.stderr
