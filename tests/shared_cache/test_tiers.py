"""Several tiers behind host memory: nearest first, and none of them takes another one with it."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from shared_cache.config import CacheConfig
from shared_cache.errors import StoreFullError, StoreUnavailableError
from shared_cache.opening import open_cache
from shared_cache.staging import SharedCache, StagedPrefix
from shared_cache.tiers import NEAR_SHARE
from tests.shared_cache.fakes import (
    BLOCK_BYTES,
    NAMESPACE,
    WAIT_S,
    FakeClock,
    Gate,
    ScriptedStore,
    await_published,
    chain_of,
    make_cache,
    payload_of,
    run_of,
    save_blocks,
)
from tests.shared_cache.scripted_host import ScriptedHost

CHAIN = chain_of(20)
HASHES = CHAIN.hashes


def store_with(num_blocks: int) -> ScriptedStore:
    store = ScriptedStore()
    if num_blocks:
        store.write(run_of(chain_of(num_blocks)))
        store.num_writes = 0
    return store


def check(cache: SharedCache, staged: StagedPrefix, num_blocks: int) -> None:
    assert staged.num_blocks == num_blocks
    for slot, block_hash in zip(staged.lease.slots, HASHES, strict=False):
        assert bytes(cache.host.buffer(slot)) == payload_of(block_hash)
    cache.release(staged)
    assert cache.flush(WAIT_S)
    stats = cache.stats().host
    assert (stats.leased_slots, stats.reserved_slots) == (0, 0)


def until(is_true: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do; the test's timeout is the limit."""
    pause = threading.Event()
    while not is_true():
        pause.wait(0.005)


def fail(_: object) -> None:
    raise StoreUnavailableError("no route")


def test_the_near_tier_gives_what_it_has_and_the_far_one_the_rest() -> None:
    near, far = store_with(11), store_with(20)
    cache = make_cache(near, far, io_threads=1)
    staged = cache.stage(HASHES)
    assert staged.fetched == frozenset(range(20))
    assert set(near.num_reads) == set(HASHES[:11])
    assert set(far.num_reads) == set(HASHES[11:])
    check(cache, staged, 20)
    first, second = cache.stats().tiers
    assert (first.url, first.read_blocks, first.read_bytes) == ("memory://0", 11, 11 * BLOCK_BYTES)
    assert (second.url, second.read_blocks) == ("memory://1", 9)
    assert first.read_s > 0
    assert cache.stats().fetched_blocks == 20
    cache.close()
    assert near.is_closed
    assert far.is_closed


def test_what_the_near_tier_has_whole_is_not_looked_for_farther_away() -> None:
    near, far = store_with(20), store_with(20)
    cache = make_cache(near, far)
    check(cache, cache.stage(HASHES), 20)
    assert (far.num_matches, sum(far.num_reads.values())) == (0, 0)
    cache.close()


def test_what_came_from_far_is_written_to_the_near_tier_and_not_back() -> None:
    near, far = store_with(0), store_with(20)
    cache = make_cache(near, far, io_threads=1, num_slots=1024)
    check(cache, cache.stage(HASHES), 20)
    assert near.match(HASHES) == 20
    assert far.num_writes == 0
    stats = cache.stats()
    assert (stats.tiers[0].written_blocks, stats.tiers[1].written_blocks) == (20, 0)
    assert stats.saved_blocks == 0, "the shared tier got nothing new"
    cache.close()


def test_blocks_that_only_the_near_tier_had_are_written_to_the_shared_one() -> None:
    """They were saved here once, and the shared tier could not be written to."""
    near, far = store_with(20), store_with(0)
    host = ScriptedHost()
    cache = make_cache(near, far, host_tier=host)
    check(cache, cache.stage(HASHES), 20)
    assert far.match(HASHES) == 20
    assert {h for hashes, is_stored in host.answers if is_stored for h in hashes} == set(HASHES)
    cache.close()


def test_new_blocks_go_to_both_tiers() -> None:
    near, far = ScriptedStore(), ScriptedStore()
    cache = make_cache(near, far, num_slots=1024)
    save_blocks(cache, CHAIN, 0, 6)
    assert cache.flush(WAIT_S)
    assert (near.match(HASHES), far.match(HASHES)) == (6, 6)
    assert [tier.written_blocks for tier in cache.stats().tiers] == [6, 6]
    assert cache.stats().saved_blocks == 6
    assert cache.stats().tiers[0].write_s > 0
    cache.close()


@pytest.mark.parametrize(
    ("admission", "after_save", "after_fetch"),
    [("always", 6, 20), ("worth", 6, 20), ("second_use", 0, 20), ("never", 0, 0)],
)
def test_the_near_tier_takes_what_its_admission_says(
    admission: str, after_save: int, after_fetch: int
) -> None:
    near, far = store_with(0), store_with(0)
    tiers = [{"url": "memory://0", "admission": admission}, {"url": "memory://1"}]
    cache = make_cache(near, far, tiers=tiers, num_slots=1024)
    save_blocks(cache, CHAIN, 0, 6)
    assert cache.flush(WAIT_S)
    assert near.match(HASHES) == after_save
    far.write(run_of(CHAIN))
    check(cache, cache.stage(HASHES), 20)
    fetched = HASHES[6:] if after_save == 0 else HASHES
    assert near.match(fetched) == (len(fetched) if after_fetch else 0)
    cache.close()


@pytest.mark.parametrize("where", ["on_match", "on_read"])
def test_a_near_tier_that_fails_leaves_it_to_the_far_one(where: str) -> None:
    near, far = store_with(20), store_with(20)
    setattr(near, where, fail)
    cache = make_cache(near, far)
    staged = cache.stage(HASHES)
    assert staged.fetched == frozenset(range(20))
    check(cache, staged, 20)
    assert cache.stats().tiers[0].faults > 0
    assert cache.stats().tiers[1].faults == 0
    cache.close()


@pytest.mark.parametrize("num_good", [0, 3, 8, 13])
def test_what_the_near_tier_only_promised_comes_from_the_far_one(num_good: int) -> None:
    near, far = store_with(num_good), store_with(20)
    near.on_match = lambda hashes: len(hashes)
    cache = make_cache(near, far)
    staged = cache.stage(HASHES)
    assert staged.fetched == frozenset(range(20))
    check(cache, staged, 20)
    assert cache.stats().store_faults == 0
    cache.close()


def test_a_far_tier_that_fails_leaves_what_the_near_one_has() -> None:
    near, far = store_with(11), store_with(20)
    far.on_match = fail
    cache = make_cache(near, far)
    check(cache, cache.stage(HASHES), 11)
    cache.close()


def test_a_far_tier_that_hangs_does_not_keep_the_near_ones_blocks() -> None:
    clock, gate = FakeClock(), Gate()
    near, far = store_with(11), store_with(20)
    far.on_match = gate
    cache = make_cache(near, far, clock=clock)
    staged = cache.stage(HASHES, deadline_s=0.2)
    assert staged.num_blocks == 11
    assert cache.stats().deadline_misses == 1
    cache.release(staged)
    clock.now_s += cache.deadline_s
    check(cache, cache.stage(HASHES, deadline_s=3600), 11)
    assert cache.stats().deadline_misses == 1, "the far tier is left alone"
    assert cache.stats().tiers[1].faults == 1
    gate.open()
    until(lambda: cache.can_fetch(HASHES, 11) and cache.stage(HASHES).num_blocks == 20)
    cache.close()


@pytest.mark.parametrize("where", ["on_match", "on_read"])
def test_a_near_tier_that_hangs_costs_a_part_of_the_deadline(where: str) -> None:
    clock, gate = FakeClock(), Gate()
    near, far = store_with(20), store_with(20)
    setattr(near, where, gate)
    host = ScriptedHost()
    cache = make_cache(near, far, clock=clock, host_tier=host, staging_deadline_s=2)
    with ThreadPoolExecutor(1) as pool:
        staging: Future[StagedPrefix] = pool.submit(cache.stage, HASHES, WAIT_S)
        gate.wait_entered()
        clock.now_s += 2 * NEAR_SHARE
        staged = staging.result(WAIT_S)
    assert staged.fetched == frozenset(range(20))
    assert cache.stats().deadline_misses == 0
    other = chain_of(3, first_token=700)
    far.write(run_of(other))
    assert cache.stage(other.hashes, deadline_s=WAIT_S).num_blocks == 3
    gate.open()
    until(lambda: cache.host.stats().reserved_slots == 0)
    for slot, block_hash in zip(staged.lease.slots, HASHES, strict=True):
        assert bytes(cache.host.buffer(slot)) == payload_of(block_hash)
    cache.close()


def test_a_near_tier_that_cannot_be_written_holds_up_no_save() -> None:
    near, far, gate = ScriptedStore(), ScriptedStore(), Gate()
    near.on_write = gate
    host = ScriptedHost()
    cache = make_cache(near, far, host_tier=host)
    for start in range(0, 20, 4):
        save_blocks(cache, CHAIN, start, start + 4)
        await_published(cache)
    until(lambda: cache.stats().saved_blocks == 20)
    assert far.match(HASHES) == 20
    assert all(is_stored for _, is_stored in host.answers)
    assert cache.stats().host.leased_slots <= 32 // 4
    assert cache.stats().tiers[0].dropped_blocks == 20 - 8
    assert cache.stats().dropped_saves == 0, "only the shared tier counts"
    gate.open()
    cache.close()


def test_a_full_shared_tier_does_not_keep_blocks_from_the_near_one() -> None:
    def full(_: object) -> None:
        raise StoreFullError("no room")

    near, far = ScriptedStore(), ScriptedStore()
    far.on_write = full
    cache = make_cache(near, far)
    save_blocks(cache, CHAIN, 0, 4)
    until(lambda: near.match(HASHES) == 4)
    assert cache.stats().pending_saves == 4
    cache.close()


def test_a_tier_is_kept_within_its_budget_until_the_cache_is_closed(tmp_path: Path) -> None:
    tiers = [{"url": f"file://{tmp_path}/shared", "max_bytes": BLOCK_BYTES}]
    host = {"scope": "process", "bytes": "1MiB"}
    cache = open_cache(CacheConfig(tiers=tiers, host=host), NAMESPACE)
    save_blocks(cache, CHAIN, 0, 6)
    assert cache.flush(WAIT_S)
    assert cache.stats().saved_blocks == 6
    tier = cache._tiers.tiers[0]
    assert tier.num_stored(HASHES, 0) == 6
    assert tier._housekeeper is not None
    assert tier._housekeeper.tick() is not None
    assert tier.num_stored(HASHES, 0) == 0
    cache.close()
    assert not any(thread.name == "kvcommons-upkeep" for thread in threading.enumerate())


def test_two_tiers_on_disk_share_blocks_between_replicas(tmp_path: Path) -> None:
    """Each machine has a disk of its own; the second one gets the blocks from the shared tier."""
    caches = []
    for machine in ("one", "two"):
        tiers = [{"url": f"file://{tmp_path}/{machine}"}, {"url": f"file://{tmp_path}/shared"}]
        host = {"scope": "process", "bytes": "1MiB"}
        caches.append(open_cache(CacheConfig(tiers=tiers, host=host), NAMESPACE))
    save_blocks(caches[0], CHAIN, 0, 20)
    assert caches[0].flush(WAIT_S)
    check(caches[1], caches[1].stage(HASHES, WAIT_S), 20)
    near, shared = caches[1].stats().tiers
    assert (near.read_blocks, shared.read_blocks) == (0, 20)
    assert near.written_blocks == 20
    for cache in caches:
        cache.close()
    again = open_cache(CacheConfig(tiers=tiers, host=host), NAMESPACE)
    check(again, again.stage(HASHES, WAIT_S), 20)
    assert [tier.read_blocks for tier in again.stats().tiers] == [20, 0]
    again.close()


def test_objects_that_are_no_good_and_retries_are_counted_per_tier(tmp_path: Path) -> None:
    """A store that decays would otherwise only make answers slower, and nobody would know why."""
    host = {"scope": "process", "bytes": "1MiB"}
    config = CacheConfig(store=f"file://{tmp_path}/shared", host=host)
    writer = open_cache(config, NAMESPACE)
    save_blocks(writer, CHAIN, 0, 6)
    assert writer.flush(WAIT_S)
    writer.close()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            path.write_bytes(bytes(byte ^ 1 for byte in data))
    reader = open_cache(config, NAMESPACE)
    reader.release(reader.stage(HASHES[:6], WAIT_S))
    tier = reader.stats().tiers[0]
    assert tier.corrupt_objects > 0
    assert (tier.foreign_objects, tier.vanished_objects, tier.retries) == (0, 0, 0)
    reader.close()
    cache = make_cache(type("Retrying", (ScriptedStore,), {"num_retries": 3})())
    assert cache.stats().tiers[0].retries == 3
    cache.close()


def test_statistics_take_no_time_under_the_lock_of_the_engines_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = make_cache(store_with(0))
    gate_stats = cache.gate.stats

    def stats() -> object:
        done = threading.Thread(target=cache.lose, args=(1,), daemon=True)
        done.start()
        done.join(WAIT_S)
        assert not done.is_alive(), "a hook of the step would wait"
        return gate_stats()

    monkeypatch.setattr(cache.gate, "stats", stats)
    assert cache.stats().dropped_saves == 1
    cache.close()
