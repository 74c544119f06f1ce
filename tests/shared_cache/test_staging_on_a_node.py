"""Staging and saving on the node's real arena: several caches, one owner that may be killed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from shared_cache.config import CacheConfig
from shared_cache.opening import open_cache
from shared_cache.staging import SharedCache, StagedPrefix
from tests.shared_cache.arenas import await_true, memory_folder, owner_process
from tests.shared_cache.fakes import (
    NAMESPACE,
    WAIT_S,
    chain_of,
    num_in_host,
    payload_of,
    save_blocks,
)
from tests.shared_cache.mini_engine import MiniEngine, MiniRequest

CHAIN = chain_of(24)
HASHES = CHAIN.hashes


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


def config_of(folder: Path, **settings: object) -> CacheConfig:
    host = {"folder": str(folder / "arena"), "bytes": "4MiB", "start_owner": False}
    fields = {"store": f"file://{folder}/store", "host": host, "cost": {"gate": False}}
    return CacheConfig.model_validate({**fields, **settings})


def opened(stack: ExitStack, config: CacheConfig, num_caches: int = 2) -> list[SharedCache]:
    """Caches of one arena; each has slots in stock."""
    caches = []
    for _ in range(num_caches):
        caches.append(open_cache(config, NAMESPACE))
        stack.callback(caches[-1].close)
    for cache in caches:
        await_stock(cache)
    return caches


def await_stock(cache: SharedCache) -> None:
    """Wait until slots were reserved ahead."""

    def has_some() -> bool:
        slots = cache.host.reserve(24)
        cache.host.cancel(slots)
        return len(slots) == 24

    await_true(has_some)


def check(cache: SharedCache, staged: StagedPrefix, num_blocks: int) -> None:
    assert staged.num_blocks == num_blocks
    for slot, block_hash in zip(staged.lease.slots, HASHES, strict=False):
        assert bytes(cache.host.buffer(slot)) == payload_of(block_hash)
    cache.release(staged)
    await_true(lambda: cache.stats().host.leased_slots == 0)


def test_one_cache_stages_what_another_has_saved_without_the_shared_tier(folder: Path) -> None:
    config = config_of(folder, store=None)
    with owner_process(config.host), ExitStack() as stack:
        saver, stager = opened(stack, config)
        save_blocks(saver, CHAIN, 0, 24)
        assert saver.flush(WAIT_S)
        check(stager, stager.stage(HASHES), 24)
        stats = stager.stats()
        assert (stats.peer_blocks, stats.staged_blocks, stats.fetched_blocks) == (24, 24, 0)
        assert saver.stats().peer_blocks == 0


def test_two_caches_that_want_the_same_blocks_read_each_of_them_once(folder: Path) -> None:
    config = config_of(folder)
    with owner_process(config.host), ExitStack() as stack:
        (writer,) = opened(stack, config_of(folder, host={"scope": "process"}), 1)
        save_blocks(writer, CHAIN, 0, 24)
        assert writer.flush(WAIT_S)
        caches = opened(stack, config)
        with ThreadPoolExecutor(2) as pool:
            staged = list(pool.map(lambda cache: cache.stage(HASHES, WAIT_S), caches))
        assert sum(cache.stats().fetched_blocks for cache in caches) == 24
        for cache, one in zip(caches, staged, strict=True):
            assert one.num_blocks == 24
            cache.release(one)
        assert all(cache.stats().saved_blocks == 0 for cache in caches)


def test_an_engine_loads_what_an_engine_of_another_process_computed(folder: Path) -> None:
    config = config_of(folder, store=None)
    with owner_process(config.host), ExitStack() as stack:
        first, second = opened(stack, config)
        answer = MiniRequest(1, list(range(1, 30)))
        MiniEngine(first).run(answer, num_new_tokens=5)
        engine, again = MiniEngine(second), MiniRequest(1, list(range(1, 30)))
        staged = second.stage(chain_of(7, first_token=1).hashes)
        assert engine.run(again, num_new_tokens=5) == 28
        second.release(staged)
        assert again.tokens == answer.tokens
        assert (engine.scheduler.connector_faults, engine.worker.connector_faults) == (0, 0)


def test_a_killed_owner_means_misses_until_the_next_one_has_taken_over(folder: Path) -> None:
    config = config_of(folder, store=None)
    with owner_process(config.host) as owner, ExitStack() as stack:
        saver, stager = opened(stack, config)
        save_blocks(saver, CHAIN, 0, 12)
        assert saver.flush(WAIT_S)
        held = stager.stage(HASHES[:12])
        owner.kill()
        for slot, block_hash in zip(held.lease.slots, HASHES, strict=False):
            assert bytes(stager.host.buffer(slot)) == payload_of(block_hash)
        assert num_in_host(stager, HASHES) == 12, "what is leased can be loaded"
        assert saver.stage(HASHES, 1).num_blocks == 0
        save_blocks(saver, CHAIN, 12, 24)
        assert saver.flush(WAIT_S)
        assert saver.stats().dropped_saves == 12
        owner.start()
        await_true(lambda: saver.stats().host.is_connected and stager.stats().host.is_connected)
        stager.release(held)
        check(saver, saver.stage(HASHES), 12)
        await_stock(saver)
        save_blocks(saver, CHAIN, 12, 24)
        assert saver.flush(WAIT_S)
        check(stager, stager.stage(HASHES), 24)
        assert stager.stats().host.num_slots == stager.host.num_slots
