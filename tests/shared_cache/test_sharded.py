"""One cache in several shards: a prefix counts as far as every rank has it, and nothing leaks."""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_cache.config import CacheConfig
from shared_cache.errors import StoreUnavailableError
from shared_cache.hashing import BlockHash, block_hashes
from shared_cache.host.interface import HostLease
from shared_cache.prefix_cache import PrefixCache, StagedPrefix
from shared_cache.sharded import LOOK_UP_S, ShardedCache, shard_config
from shared_cache.staging import SharedCache
from tests.shared_cache.fakes import (
    LAYOUT,
    WAIT_S,
    FakeClock,
    Gate,
    ScriptedStore,
    await_published,
    chain_of,
    fill_host,
    make_cache,
    num_in_host,
    run_of,
)
from tests.shared_cache.mini_engine import SIZE, MiniEngine, MiniRequest
from tests.shared_cache.scripted_host import ScriptedHost

CHAIN = chain_of(8)
HASHES = CHAIN.hashes
PROMPT = list(range(1, 30))


@contextmanager
def opened(*shards: SharedCache) -> Iterator[ShardedCache]:
    cache = ShardedCache(shards)
    try:
        yield cache
    finally:
        cache.close()


def stored(num_blocks: int) -> ScriptedStore:
    """A store that has so many blocks of the chain."""
    store = ScriptedStore()
    store.write(run_of(chain_of(num_blocks)))
    return store


def leased_slots(cache: ShardedCache) -> list[int]:
    return [shard.stats().host.leased_slots for shard in cache.shards]


def num_held(shard: SharedCache) -> int:
    host = shard.stats().host
    return host.leased_slots + host.reserved_slots


def check_quiet(cache: ShardedCache) -> None:
    """Nothing is leased or reserved in any shard once all work is done."""
    assert cache.flush(WAIT_S)
    deadline_s = time.monotonic() + WAIT_S
    while any(map(num_held, cache.shards)):  # by fetches that nobody waits for any more
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


# What counts


def test_both_kinds_of_cache_are_prefix_caches() -> None:
    one: PrefixCache = make_cache(None)
    with opened(make_cache(None)) as many:
        caches: list[PrefixCache] = [one, many]
        for cache in caches:
            staged = cache.lease(HASHES)
            assert (staged.num_blocks, staged.end) == (0, 0)
            assert len(cache.places(staged)) == 1
            cache.release(staged)
    one.close()


def test_a_cache_without_shards_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one shard"):
        ShardedCache([])


def test_a_prefix_is_as_long_as_the_shortest_shard_and_released_in_all() -> None:
    with opened(*(make_cache(None) for _ in range(3))) as cache:
        for shard, num_blocks in zip(cache.shards, (8, 3, 6), strict=True):
            fill_host(shard, HASHES[:num_blocks])
        staged = cache.lease(HASHES)
        assert (staged.num_blocks, staged.end) == (3, 3)
        held = cache.lease_held(HASHES)
        assert held.num_blocks == 3
        cache.release(staged)
        assert leased_slots(cache) == [8, 3, 3], "no shard holds more than those before it have"
        cache.release(held)
        cache.release(held)
        assert leased_slots(cache) == [0, 0, 0]


def test_a_prefix_behind_the_devices_blocks_begins_there_in_every_shard() -> None:
    with opened(make_cache(None), make_cache(None)) as cache:
        for shard in cache.shards:
            fill_host(shard, HASHES[2:6])
        for staged in (cache.lease(HASHES, 2), cache.lease_held(HASHES, 2)):
            assert (staged.first, staged.num_blocks, staged.end) == (2, 4, 6)
            places = cache.places(staged)
            assert [len(place.slots) for place in places] == [4, 4]
            for shard, place in zip(cache.shards, places, strict=True):
                lease = shard.host.lease_held(HASHES[2:6])
                right = [bytes(shard.host.buffer(slot)) for slot in lease.slots]
                assert [bytes(one) for one in shard.host.blocks_at(place).views()] == right
                shard.host.release(lease)
            cache.release(staged)
        check_quiet(cache)


# Staging


def test_all_shards_are_fetched_at_the_same_time() -> None:
    """Neither store answers before both were asked."""
    together = threading.Barrier(2, timeout=WAIT_S)
    stores = [stored(8), stored(8)]

    def asked(hashes: Sequence[BlockHash]) -> None:
        together.wait()

    for store in stores:
        store.on_match = asked
    with opened(*map(make_cache, stores)) as cache:
        staged = cache.stage(HASHES)
        assert staged.num_blocks == 8
        assert staged.fetched == frozenset(range(8))
        cache.release(staged)
        check_quiet(cache)
        stats = cache.stats()
        assert (stats.staged_blocks, stats.fetched_blocks) == (8, 8)
        assert stats.fetched_bytes == 2 * 8 * LAYOUT.block_bytes


def test_a_block_counts_as_fetched_when_any_rank_had_to_wait_for_it() -> None:
    with opened(make_cache(stored(8)), make_cache(stored(8))) as cache:
        fill_host(cache.shards[0], HASHES[:6])
        fill_host(cache.shards[1], HASHES[:2])
        staged = cache.stage(HASHES)
        assert (staged.num_blocks, staged.fetched) == (8, frozenset(range(2, 8)))
        cache.release(staged)


def test_a_store_that_fails_makes_the_prefix_shorter_for_all() -> None:
    good, bad = stored(8), stored(8)

    def fail(hashes: Sequence[BlockHash]) -> None:
        raise StoreUnavailableError("gone")

    bad.on_read = fail
    with opened(make_cache(good), make_cache(bad)) as cache:
        fill_host(cache.shards[1], HASHES[:3])
        staged = cache.stage(HASHES)
        assert staged.num_blocks == 3
        cache.release(staged)
        check_quiet(cache)
        assert cache.stats().store_faults == 1
        # From now on it is known, and nobody fetches what is of no use.
        before = good.num_reads.copy()
        another = chain_of(8, first_token=100)
        good.write(run_of(another))
        fill_host(cache.shards[1], another.hashes[:2])
        again = cache.stage(another.hashes)
        assert again.num_blocks == 2
        assert set(good.num_reads - before) == set(another.hashes[:2])
        cache.release(again)
        check_quiet(cache)


def test_a_store_that_hangs_costs_the_deadline_once_and_the_prefix_is_what_came() -> None:
    good, slow, gate = stored(8), stored(8), Gate()
    slow.on_read = gate
    with opened(make_cache(good), make_cache(slow)) as cache:
        fill_host(cache.shards[1], HASHES[:2])
        start_s = time.monotonic()
        staged = cache.stage(HASHES, 0.3)
        assert 0.25 <= time.monotonic() - start_s < 2.0
        assert (staged.num_blocks, staged.fetched) == (2, frozenset(range(2)))
        cache.release(staged)
        gate.open()
        check_quiet(cache)
        again = cache.stage(HASHES)
        assert again.num_blocks == 8, "what came later serves the next one"
        cache.release(again)
        check_quiet(cache)


def test_an_owner_that_is_away_for_one_shard_is_a_miss_for_all() -> None:
    away = ScriptedHost()
    with opened(make_cache(None), make_cache(None, host_tier=away)) as cache:
        for shard in cache.shards:
            fill_host(shard, HASHES)
        held = cache.lease(HASHES)
        assert held.num_blocks == 8
        away.is_away = True
        missed = cache.lease(HASHES)
        assert missed.num_blocks == 0
        assert cache.lease_held(HASHES).num_blocks == 8, "what is leased can still be loaded"
        cache.release(missed)
        cache.release(held)


def test_an_owner_that_hangs_is_not_asked_for_one_shard_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shared_cache.sharded.LOOK_UP_S", 0.05)
    assert LOOK_UP_S >= 0.5
    num_asked = 0

    def hanging(*args: object) -> StagedPrefix:
        nonlocal num_asked
        num_asked += 1
        time.sleep(0.06)
        return StagedPrefix(HostLease(0, ()))

    with opened(*(make_cache(None) for _ in range(8))) as cache:
        for shard in cache.shards:
            monkeypatch.setattr(shard, "lease", hanging)
        assert cache.lease(HASHES).num_blocks == 0
        assert num_asked == 1


@pytest.mark.parametrize("verb", ["lease", "lease_held", "growing"])
def test_an_error_in_one_shard_leaves_nothing_leased_in_the_others(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(make_cache(stored(8)), make_cache(stored(8))) as cache:
        for shard in cache.shards:
            fill_host(shard, HASHES[:4])
        staged = cache.lease(HASHES) if verb == "growing" else None

        def fail(*args: object) -> StagedPrefix:
            raise RuntimeError("a fault")

        monkeypatch.setattr(cache.shards[1], verb, fail)
        arguments = (HASHES,) if staged is None else (staged, HASHES)
        with pytest.raises(RuntimeError, match="a fault"):
            getattr(cache, "grow" if verb == "growing" else verb)(*arguments)
        check_quiet(cache)


def test_nothing_is_staged_of_nothing() -> None:
    nothing = StagedPrefix(HostLease(-1, ()))
    with opened(make_cache(stored(8))) as cache:
        assert cache.grow(nothing, HASHES).num_blocks == 0
        cache.release(nothing)


Contents = tuple[int, int, bool]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 8), st.booleans()), min_size=1, max_size=4
    ),
    st.integers(0, 3),
)
def test_whatever_each_shard_has_the_prefix_is_what_all_can_have(
    contents: list[Contents], first: int
) -> None:
    """Of each shard: blocks in host memory, blocks in its store, whether that can be read."""
    shards = []
    for num_here, num_stored, is_readable in contents:
        store = stored(num_stored) if num_stored else ScriptedStore()
        if not is_readable:
            store.on_match = _unavailable
        shards.append(make_cache(store))
        fill_host(shards[-1], HASHES[:num_here])
    with opened(*shards) as cache:
        staged = cache.grow(cache.lease(HASHES, first), HASHES)
        reach = [max(here, kept if is_up else 0) for here, kept, is_up in contents]
        assert staged.end == max(first, min(reach))
        held = cache.lease_held(HASHES, first)
        assert held.end >= staged.end
        cache.release(held)
        cache.release(staged)
        check_quiet(cache)


def _unavailable(hashes: Sequence[BlockHash]) -> int:
    raise StoreUnavailableError("gone")


# Engines of several ranks


def test_an_engine_of_two_ranks_loads_what_another_one_computed() -> None:
    """Each rank has bytes of its own, which the engine checks."""
    stores = [ScriptedStore(), ScriptedStore()]
    with opened(*map(make_cache, stores)) as first, opened(*map(make_cache, stores)) as second:
        answer, again = MiniRequest(1, list(PROMPT)), MiniRequest(1, list(PROMPT))
        assert MiniEngine(first).run(answer, num_new_tokens=9) == 0
        assert first.flush(WAIT_S)
        engine = MiniEngine(second)
        staged = second.stage(block_hashes(PROMPT, SIZE))
        assert engine.run(again, num_new_tokens=9) == 28
        second.release(staged)
        assert again.tokens == answer.tokens
        for _ in range(2):
            engine.turn()
        check_quiet(second)
        assert second.stats().fetched_blocks == 7


def test_a_rank_that_has_no_room_to_save_makes_the_prefix_shorter_not_wrong() -> None:
    with opened(make_cache(None), make_cache(None, num_slots=10)) as cache:
        engine = MiniEngine(cache)
        held = cache.shards[1].host.reserve(6)
        engine.run(MiniRequest(1, list(PROMPT)))
        assert [num_in_host(shard, block_hashes(PROMPT, SIZE)) for shard in cache.shards] == [7, 4]
        assert cache.stats().dropped_saves == 3
        cache.shards[1].host.cancel(held)
        assert engine.run(MiniRequest(2, list(PROMPT))) == 16
        assert engine.run(MiniRequest(3, list(PROMPT))) == 28, "the others were saved again"
        for _ in range(2):
            engine.turn()
        check_quiet(cache)


def test_leases_of_all_ranks_end_two_turns_after_an_abort() -> None:
    with opened(make_cache(None), make_cache(None)) as cache:
        engine = MiniEngine(cache)
        engine.run(MiniRequest(1, list(PROMPT)))
        aborted = MiniRequest(2, list(PROMPT))
        engine.start(aborted)
        engine.turn(new=(aborted,))
        engine.abort(aborted)
        assert leased_slots(cache) == [7, 7]
        engine.turn()
        assert leased_slots(cache) == [7, 7]
        engine.turn()
        assert leased_slots(cache) == [0, 0]


def test_blocks_that_wait_are_saved_by_every_rank_when_their_request_ends() -> None:
    with opened(make_cache(None), make_cache(None)) as cache:
        engine = MiniEngine(cache)
        budget = cache.turn_budget
        decoding = MiniRequest(1, list(range(500, 500 + SIZE)))
        engine.start(decoding)
        engine.turn(new=(decoding,))
        for _ in range(64):
            budget.saw_decode_turn(1.0)
            budget.saw_copies(1, 0.05)  # two blocks a turn
        request = MiniRequest(2, list(PROMPT))
        engine.start(request)
        engine.turn(decoding, new=(request,))
        engine.turn(decoding, request)
        engine.finish(request)
        for rank in engine.ranks:
            await_published(engine.shards[rank])
        engine.turn(decoding)
        for shard in cache.shards:
            await_published(shard)
        hashes = block_hashes(PROMPT, SIZE)
        assert [num_in_host(shard, hashes) for shard in cache.shards] == [7, 7]
        assert engine.run(MiniRequest(3, list(PROMPT))) == 28


def test_ranks_that_evict_and_fail_apart_never_attend_to_a_wrong_block() -> None:
    """Random prompts on two engines of three ranks; each rank has room and faults of its own."""
    draw = random.Random(5)
    stores = [ScriptedStore() for _ in range(3)]
    for store in stores:
        store.on_read = lambda hashes: _fail_sometimes(draw)
    clocks = [FakeClock(), FakeClock()]
    engines = []
    for clock in clocks:
        rooms = zip(stores, (24, 40, 30), strict=True)
        shards = [make_cache(store, num_slots=room, clock=clock) for store, room in rooms]
        engines.append(MiniEngine(ShardedCache(shards), num_blocks=80, chunk=7))
    num_loaded = 0
    for round_ in range(25):
        for clock, engine in zip(clocks, engines, strict=True):
            clock.now_s += 60  # a tier that failed is asked again
            num_loaded += play(engine, draw, 10 * round_)
    assert num_loaded > 300
    for engine in engines:
        assert engine.scheduler.connector_faults == 0
        assert [worker.connector_faults for worker in engine.workers] == [0, 0, 0]
        assert engine.cache.stats().fetched_blocks > 0
        for request_id in range(260):
            engine.scheduler._ledger.forget(request_id)
        for _ in range(3):
            engine.turn()
        assert isinstance(engine.cache, ShardedCache)
        check_quiet(engine.cache)
        engine.cache.close()


def play(engine: MiniEngine, draw: random.Random, first_id: int) -> int:
    """Three requests that begin one after the other; tokens that were loaded for them."""
    running: list[MiniRequest] = []
    for index in range(3):
        tokens = PROMPT[: draw.randrange(1, 29)] + [draw.randrange(3)] * draw.randrange(9)
        request = MiniRequest(first_id + index, tokens)
        staged = engine.cache.stage(block_hashes(tokens, SIZE))
        engine.start(request, device_tokens=draw.choice([0, 0, 0, len(tokens) // 2]))
        engine.turn(*running, new=(request,))
        engine.cache.release(staged)
        running.append(request)
    for _ in range(draw.randrange(12)):
        engine.turn(*running)
    for request in running:
        draw.choice([engine.finish, engine.finish, engine.abort])(request)
    return sum(request.num_loaded_tokens for request in running)


def _fail_sometimes(draw: random.Random) -> None:
    if draw.random() < 0.2:
        raise StoreUnavailableError("a fault")


# Its parts


def test_shards_of_one_process_share_what_is_limited() -> None:
    config = CacheConfig.model_validate(
        {
            "io_threads": 6,
            "save_queue_bytes": "8MiB",
            "cost": {"max_fetch_bytes_per_s": "1MiB", "gate": False},
        }
    )
    one = shard_config(config, 4)
    assert (one.io_threads, one.save_queue_bytes) == (2, 2 << 20)
    assert (one.cost.max_fetch_bytes_per_s, one.cost.gate) == (1 << 18, False)
    assert shard_config(CacheConfig(), 8).cost.max_fetch_bytes_per_s is None
    assert shard_config(config, 1) == config


def test_counters_are_those_of_whole_blocks() -> None:
    with opened(make_cache(ScriptedStore()), make_cache(ScriptedStore())) as cache:
        engine = MiniEngine(cache)
        engine.run(MiniRequest(1, list(PROMPT)))
        assert cache.flush(WAIT_S)
        cache.miss_deadline()
        cache.lose(5)
        stats = cache.stats()
        assert (stats.saved_blocks, stats.saved_bytes) == (7, 14 * LAYOUT.block_bytes)
        assert (stats.dropped_saves, stats.deadline_misses, stats.pending_saves) == (5, 1, 0)
        (tier,) = stats.tiers
        assert (tier.written_blocks, tier.written_bytes) == (7, 14 * LAYOUT.block_bytes)
        host = stats.host
        assert (host.used_slots, host.block_bytes) == (7, 2 * LAYOUT.block_bytes)
        assert host.free_slots + host.used_slots + host.reserved_slots == host.num_slots
        assert host.is_connected
        assert cache.num_blocks == 32


def test_closing_closes_every_shard_and_ends_waiting() -> None:
    stores = [ScriptedStore(), ScriptedStore()]
    cache = ShardedCache([make_cache(store) for store in stores])
    cache.close()
    cache.close()
    assert [store.is_closed for store in stores] == [True, True]
    assert not cache.is_flush_hopeless
