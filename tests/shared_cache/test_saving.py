"""Saves: in the background, bounded, dropped under pressure, never in the engine's way."""

import subprocess
import sys

import pytest

from shared_cache.errors import StoreFullError, StoreReadOnlyError
from shared_cache.hashing import BlockHashChain
from shared_cache.staging import SharedCache
from tests.shared_cache.fakes import (
    BLOCK_BYTES,
    WAIT_S,
    FakeClock,
    Gate,
    ScriptedStore,
    chain_of,
    make_cache,
    payload_of,
)

CHAIN = chain_of(6)


def save(cache: SharedCache, chain: BlockHashChain, start: int, stop: int) -> None:
    """What the connector's worker does after a forward pass."""
    hashes = chain.hashes[start:stop]
    slots = cache.reserve(len(hashes))
    for slot, block_hash in zip(slots, hashes, strict=False):
        cache.host.buffer(slot)[:] = payload_of(block_hash)
    cache.save(slots, chain.parent_of(start), hashes[: len(slots)])


def test_saved_blocks_reach_host_memory_at_once_and_the_store_soon() -> None:
    store = ScriptedStore()
    cache = make_cache(store)
    save(cache, CHAIN, 0, 2)
    assert cache.host.match(CHAIN.hashes) == 2
    save(cache, CHAIN, 2, 6)
    assert cache.flush(WAIT_S)
    buffers = [memoryview(bytearray(BLOCK_BYTES)) for _ in CHAIN.hashes]
    assert store.read_into(CHAIN.hashes, buffers) == 6
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
    stats = cache.stats()
    assert (stats.pending_saves, stats.dropped_saves) == (4, 2 + 3)
    assert cache.host.match(CHAIN.hashes) == 6
    assert cache.host.match(other.hashes) == 3
    assert not cache.flush(0.01)
    gate.open()
    assert cache.flush(WAIT_S)
    assert store.match(CHAIN.hashes) == 4
    assert cache.stats().host.leased_slots == 0
    cache.close()


def test_blocks_waiting_to_be_written_are_not_evicted() -> None:
    store, gate = ScriptedStore(), Gate()
    store.on_write = gate
    cache = make_cache(store, num_slots=8)
    save(cache, CHAIN, 0, 6)
    gate.wait_entered()
    assert len(cache.reserve(8)) == 2
    assert cache.stats().dropped_saves == 6
    gate.open()
    assert cache.flush(WAIT_S)
    buffers = [memoryview(bytearray(BLOCK_BYTES)) for _ in CHAIN.hashes]
    assert store.read_into(CHAIN.hashes, buffers) == 6
    assert [bytes(b) for b in buffers] == [payload_of(h) for h in CHAIN.hashes]
    cache.close()


def test_a_full_store_drops_writes_is_left_alone_and_still_read() -> None:
    store, clock = ScriptedStore(), FakeClock()

    def full(_: object) -> None:
        raise StoreFullError("no room left")

    cache = make_cache(store, clock=clock)
    save(cache, CHAIN, 0, 2)
    assert cache.flush(WAIT_S)
    store.on_write = full
    for start in (2, 3, 4):
        save(cache, CHAIN, start, start + 1)
        assert cache.flush(WAIT_S)
    stats = cache.stats()
    assert (stats.store_faults, stats.dropped_saves, stats.saved_blocks) == (1, 3, 2)
    assert store.num_writes == 2
    unseen = chain_of(1, first_token=900)
    cache.release(cache.stage(unseen.hashes))
    assert store.num_matches == 1
    store.on_write = lambda _: None
    clock.now_s += 1
    save(cache, CHAIN, 5, 6)
    assert cache.flush(WAIT_S)
    assert cache.stats().saved_blocks == 3
    cache.close()


def test_a_read_only_store_is_read_and_never_written() -> None:
    store = ScriptedStore()
    store.read_only = True
    cache = make_cache(store)
    save(cache, CHAIN, 0, 6)
    assert cache.flush(0)
    assert store.num_writes == 0
    assert cache.host.match(CHAIN.hashes) == 6
    assert cache.stats().host.leased_slots == 0
    cache.close()


def test_a_store_that_turns_out_read_only_is_tried_once(caplog: pytest.LogCaptureFixture) -> None:
    store, clock = ScriptedStore(), FakeClock()

    def refuse(_: object) -> None:
        raise StoreReadOnlyError("no right to write")

    store.on_write = refuse
    cache = make_cache(store, clock=clock)
    for start in range(3):
        save(cache, CHAIN, start, start + 1)
        assert cache.flush(WAIT_S)
        clock.now_s += 100
    assert store.num_writes == 1
    assert cache.stats().dropped_saves == 3
    assert "saving ends here" in caplog.text
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
    assert stats.pending_saves == 0
    assert stats.saved_blocks + stats.dropped_saves == 7
    assert stats.host.leased_slots == 0


def test_a_process_that_forgets_to_close_ends_even_while_the_store_hangs() -> None:
    """The write never returns; the interpreter must end all the same, without a crash."""
    script = """
import threading
import shared_cache.fetching, shared_cache.saving
from tests.shared_cache.fakes import ScriptedStore, chain_of, make_cache
from tests.shared_cache.test_saving import save
shared_cache.saving.CLOSE_TIMEOUT_S = shared_cache.fetching.CLOSE_TIMEOUT_S = 0.2
store = ScriptedStore()
entered = threading.Event()
def hang(_):
    entered.set()
    threading.Event().wait()
store.on_write = store.on_read = hang
cache = make_cache(store)
save(cache, chain_of(3), 0, 3)
assert entered.wait(10)
print("done")
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout.strip()) == (0, "done"), result.stderr
