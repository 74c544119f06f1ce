"""Staging and saving over a host tier that other processes use too, and whose owner may be away."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from shared_cache.hashing import DEFAULT_SCOPE, ReuseScope
from shared_cache.host.interface import HostClaim, NewRun
from shared_cache.stores.store import BlockRun
from tests.shared_cache.fakes import (
    BLOCK_BYTES,
    WAIT_S,
    Gate,
    ScriptedStore,
    await_published,
    chain_of,
    make_cache,
    num_in_host,
    payload_of,
    run_of,
    save_blocks,
)
from tests.shared_cache.mini_engine import MiniEngine, MiniRequest
from tests.shared_cache.scripted_host import ScriptedHost

CHAIN = chain_of(20)
HASHES = CHAIN.hashes


@pytest.fixture
def store() -> ScriptedStore:
    store = ScriptedStore()
    store.write(run_of(CHAIN))
    return store


def wait_for_claim(host: ScriptedHost, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when somebody was told that a block is coming, and has nothing to do but wait."""
    told, claim = threading.Event(), host.claim

    def claim_and_tell(*args: object) -> HostClaim:
        answer = claim(*args)  # type: ignore[arg-type]
        if answer.is_coming and not answer.slots:
            told.set()
        return answer

    monkeypatch.setattr(host, "claim", claim_and_tell)
    return told


def check(cache, staged, num_blocks: int) -> None:  # type: ignore[no-untyped-def]
    assert staged.num_blocks == num_blocks
    for slot, block_hash in zip(staged.lease.slots, HASHES, strict=False):
        assert bytes(cache.host.buffer(slot)) == payload_of(block_hash)
    cache.release(staged)
    stats = cache.stats().host
    assert (stats.leased_slots, stats.reserved_slots) == (0, 0)


def test_what_a_peer_is_reading_is_waited_for_and_not_read_twice(
    store: ScriptedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ScriptedHost()
    told = wait_for_claim(host, monkeypatch)
    cache = make_cache(store, host_tier=host)
    slots = host.peer_claims(HASHES[:12])
    with ThreadPoolExecutor(1) as pool:
        staging = pool.submit(cache.stage, HASHES)
        assert told.wait(WAIT_S)
        host.peer_commits(slots, NewRun(CHAIN.parent_of(0), tuple(HASHES[:12])))
        staged = staging.result(WAIT_S)
    assert staged.fetched == frozenset(range(12, 20))
    assert set(store.num_reads) == set(HASHES[12:])
    assert cache.stats().peer_blocks == 12
    check(cache, staged, 20)
    cache.close()


def test_what_a_peer_saved_is_staged_without_asking_the_store(store: ScriptedStore) -> None:
    host = ScriptedHost()
    cache = make_cache(store, host_tier=host)
    host.peer_commits(host.peer_claims(HASHES), NewRun(CHAIN.parent_of(0), tuple(HASHES)))
    check(cache, cache.stage(HASHES), 20)
    assert store.num_matches == 0
    assert (cache.stats().peer_blocks, cache.stats().fetched_blocks) == (20, 0)
    cache.close()


def test_what_a_dead_peer_was_reading_is_read_here(
    store: ScriptedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ScriptedHost()
    told = wait_for_claim(host, monkeypatch)
    cache = make_cache(store, host_tier=host)
    host.peer_claims(HASHES[:12])
    with ThreadPoolExecutor(1) as pool:
        staging = pool.submit(cache.stage, HASHES)
        assert told.wait(WAIT_S)
        host.peer_dies()
        staged = staging.result(WAIT_S)
    assert staged.fetched == frozenset(range(20))
    check(cache, staged, 20)
    cache.close()


def test_a_peer_that_never_brings_its_blocks_costs_a_part_of_the_deadline(
    store: ScriptedStore,
) -> None:
    """It hangs with its claim; its late bytes change nothing."""
    host = ScriptedHost()
    cache = make_cache(store, host_tier=host, staging_deadline_s=0.2)
    slots = host.peer_claims(HASHES[3:5])
    staged = cache.stage(HASHES, WAIT_S)
    assert staged.fetched == frozenset(range(20))
    host.peer_commits(slots, NewRun(HASHES[2], tuple(HASHES[3:5])))
    check(cache, staged, 20)
    cache.close()


def test_an_owner_that_is_away_means_misses_and_dropped_saves_and_nothing_else(
    store: ScriptedStore,
) -> None:
    host = ScriptedHost()
    cache = make_cache(store, host_tier=host)
    host.is_away = True
    assert cache.stage(HASHES).num_blocks == 0
    other = chain_of(4, first_token=900)
    save_blocks(cache, other, 0, 4)
    assert cache.flush(WAIT_S)
    stats = cache.stats()
    assert (stats.dropped_saves, stats.saved_blocks, stats.store_faults) == (4, 0, 0)
    assert (stats.host.reserved_slots, stats.host.leased_slots) == (0, 0)
    host.is_away = False
    check(cache, cache.stage(HASHES), 20)
    save_blocks(cache, other, 0, 4)
    assert cache.flush(WAIT_S)
    assert cache.stats().saved_blocks == 4
    cache.close()


def test_blocks_that_have_come_are_staged_though_the_owner_went_away_meanwhile(
    store: ScriptedStore,
) -> None:
    host, late = ScriptedHost(), Gate()
    store.on_read = lambda hashes: None if HASHES[0] in hashes else late()
    cache = make_cache(store, host_tier=host, io_threads=1)
    with ThreadPoolExecutor(1) as pool:
        staging = pool.submit(cache.stage, HASHES)
        late.wait_entered()
        host.is_away = True
        late.open()
        staged = staging.result(WAIT_S)
    assert staged.num_blocks == 8
    check(cache, staged, 8)
    cache.close()


def test_a_save_that_was_dropped_is_made_up_for_when_the_block_is_used_again() -> None:
    host, store, gate = ScriptedHost(), ScriptedStore(), Gate()
    store.on_write = gate
    cache = make_cache(store, host_tier=host, save_queue_bytes=4 * BLOCK_BYTES)
    save_blocks(cache, CHAIN, 0, 6)
    await_published(cache)
    assert host.answers == [(tuple(HASHES[4:6]), False)]
    gate.open()
    assert cache.flush(WAIT_S)
    assert store.match(HASHES) == 4
    cache.release(cache.stage(HASHES[:6]))
    assert cache.flush(WAIT_S)
    assert store.match(HASHES) == 6
    assert (
        sorted(store.entries(), key=lambda run: HASHES.index(run.hashes[0]))[4].parent
        == (HASHES[3])
    )
    assert host.answers[-1] == (tuple(HASHES[4:6]), True)
    assert cache.stats().host.leased_slots == 0
    cache.close()


def test_with_second_use_only_what_is_leased_again_is_written() -> None:
    host, store = ScriptedHost(admission="second_use"), ScriptedStore()
    cache = make_cache(store, host_tier=host, tier={"admission": "second_use"})
    save_blocks(cache, CHAIN, 0, 6)
    assert cache.flush(WAIT_S)
    assert store.num_writes == 0
    cache.release(cache.stage(HASHES[:3]))
    assert cache.flush(WAIT_S)
    assert store.match(HASHES) == 3
    cache.release(cache.lease(HASHES[:6], first=2))
    assert cache.flush(WAIT_S)
    assert store.match(HASHES) == 6
    assert cache.stats().host.leased_slots == 0
    cache.close()


def test_who_cannot_write_says_so_and_another_process_is_asked() -> None:
    store = ScriptedStore()
    store.read_only = True
    host = ScriptedHost()
    cache = make_cache(store, host_tier=host)
    save_blocks(cache, CHAIN, 0, 3)
    assert cache.flush(WAIT_S)
    assert host.answers == [(tuple(HASHES[:3]), False)]
    assert cache.stats().dropped_saves == 0
    assert cache.stats().host.leased_slots == 0
    cache.close()


def test_fetched_blocks_are_not_stored_again_and_keep_the_checksums_of_the_store(
    store: ScriptedStore,
) -> None:
    host = ScriptedHost()
    cache = make_cache(store, host_tier=host)
    cache.release(cache.stage(HASHES))
    assert all(run.is_stored and len(run.checksums) == len(run.hashes) for run in host.committed)
    cache.release(cache.stage(HASHES))
    assert cache.flush(WAIT_S)
    assert host.answers == []
    assert store.num_writes == 1
    cache.close()


def test_stores_get_the_checksums_that_the_host_tier_has() -> None:
    store, written = ScriptedStore(), list[BlockRun]()
    store.on_write = written.append
    cache = make_cache(store, host_tier=ScriptedHost())
    save_blocks(cache, CHAIN, 0, 3)
    assert cache.flush(WAIT_S)
    lease = cache.host.lease(HASHES[:3])
    assert written[0].checksums == tuple(map(cache.host.checksum, lease.slots))
    cache.host.release(lease)
    cache.close()


def test_blocks_carry_their_tenant_and_their_parent_whichever_way_they_come() -> None:
    scope = ReuseScope(cache_salt="somebody")
    chain = chain_of(4, scope=scope)
    store, host = ScriptedStore(), ScriptedHost()
    cache = make_cache(store, host_tier=host)
    engine = MiniEngine(cache)
    engine.run(MiniRequest(1, list(range(9)), cache_salt="somebody"))
    assert cache.flush(WAIT_S)
    (saved,) = host.committed
    assert (saved.tenant, saved.parent) == (scope.tenant, scope.root_hash())
    assert saved.hashes == tuple(chain.hashes[:2])
    fresh = ScriptedHost()
    other = make_cache(store, host_tier=fresh)
    other.release(other.stage(chain.hashes, scope=scope))
    (fetched,) = fresh.committed
    assert (fetched.tenant, fetched.parent) == (scope.tenant, scope.root_hash())
    assert scope.root_hash() != DEFAULT_SCOPE.root_hash()
    for one in (cache, other):
        one.close()


def test_the_engines_step_asks_nobody_and_loads_what_was_staged(store: ScriptedStore) -> None:
    host = ScriptedHost()
    cache = make_cache(ScriptedStore(), host_tier=host)
    engine = MiniEngine(cache)
    prompt = list(range(30))
    engine.run(MiniRequest(1, list(prompt)), num_new_tokens=9)
    me = threading.current_thread().name
    assert host.asked_by[me] == 0
    assert set(host.asked_by) <= {"kvcommons-publish", *(f"kvcommons-save-{i}" for i in range(4))}
    again = MiniRequest(2, list(prompt))
    assert cache.flush(WAIT_S)
    assert engine.run(again) == 0, "nothing is leased for it"
    staged = cache.stage(chain_of(7).hashes)
    asked = host.asked_by[me]
    assert engine.run(MiniRequest(3, list(prompt))) == 28
    assert host.asked_by[me] == asked
    cache.release(staged)
    cache.close()


def test_a_damaged_block_ends_the_prefix_where_every_load_is_verified(
    store: ScriptedStore,
) -> None:
    host = ScriptedHost()
    cache = make_cache(store, host_tier=host, host={"scope": "process", "verify_every_load": True})
    check(cache, cache.stage(HASHES), 20)
    host.damage(HASHES[5])
    staged = cache.lease(HASHES)
    assert staged.num_blocks == 5
    assert cache.stats().store_faults == 1
    check(cache, staged, 5)
    check(cache, cache.stage(HASHES), 20)
    assert num_in_host(cache, HASHES) == 0, "nothing is leased any more"
    cache.close()


def test_a_look_up_that_finds_damage_gives_back_the_duty_to_store() -> None:
    """The blocks before the damage are stored after the next look-up."""
    store, host = ScriptedStore(), ScriptedHost(admission="second_use")
    cache = make_cache(store, host_tier=host, host={"scope": "process", "verify_every_load": True})
    save_blocks(cache, CHAIN, 0, 6)
    assert cache.flush(WAIT_S)
    host.damage(HASHES[3])
    for _ in range(3):
        cache.release(cache.lease(HASHES[:6]))
        assert cache.flush(WAIT_S)
    assert store.match(HASHES) == 3
    cache.close()


def test_who_cannot_write_gives_duties_back_seldom() -> None:
    store = ScriptedStore()
    store.read_only = True
    host = ScriptedHost()
    cache = make_cache(store, host_tier=host)
    save_blocks(cache, CHAIN, 0, 3)
    for _ in range(5):
        assert cache.flush(WAIT_S)
        cache.release(cache.lease(HASHES[:3]))
    assert host.answers == [(tuple(HASHES[:3]), False)], "not at every look-up"
    cache.close()
