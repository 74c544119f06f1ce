"""An engine of two ranks on the node's real arena: rank 0 leases for both, rank 1 only copies.

Each rank has connections of its own, as it has in a process of its own. The engine checks every
byte that it attends to, on both ranks.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from shared_cache.config import CacheConfig
from shared_cache.hashing import block_hashes
from shared_cache.opening import open_cache
from shared_cache.sharded import ShardedCache, shard_config
from tests.shared_cache.arenas import (
    OwnerProcess,
    await_true,
    memory_folder,
    owner_process,
    paths_of,
)
from tests.shared_cache.fakes import NAMESPACE, WAIT_S
from tests.shared_cache.mini_engine import SIZE, MiniEngine, MiniRequest

PROMPT = list(range(1, 30))
HASHES = block_hashes(PROMPT, SIZE)
NUM_RANKS = 2


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture
def config(folder: Path) -> CacheConfig:
    host = {"folder": str(folder / "arena"), "bytes": "8MiB", "start_owner": False}
    fields = {"store": f"file://{folder}/store", "host": host, "cost": {"gate": False}}
    return CacheConfig.model_validate(fields)


@contextmanager
def engine_of(config: CacheConfig) -> Iterator[MiniEngine]:
    """An engine whose rank 0 has a part in both shards, and rank 1 one in its own."""
    with ExitStack() as stack:
        namespaces = [replace(NAMESPACE, tp_rank=rank, tp_size=NUM_RANKS) for rank in (0, 1)]
        mine = shard_config(config, NUM_RANKS)
        led = ShardedCache([open_cache(mine, namespace) for namespace in namespaces])
        stack.callback(led.close)
        of_rank_1 = open_cache(config, namespaces[1])
        stack.callback(of_rank_1.close)
        engine = MiniEngine(led, shards=[led.shards[0], of_rank_1])
        await_stock(engine)
        yield engine


def await_stock(engine: MiniEngine) -> None:
    """Wait until every rank can save a prompt."""
    for shard in engine.shards:

        def has_some() -> bool:
            slots = shard.host.reserve(8)  # noqa: B023 - called in this round only
            shard.host.cancel(slots)  # noqa: B023
            return len(slots) == 8

        await_true(has_some)


def sharded(engine: MiniEngine) -> ShardedCache:
    assert isinstance(engine.cache, ShardedCache)
    return engine.cache


def compute(engine: MiniEngine) -> MiniRequest:
    request = MiniRequest(1, list(PROMPT))
    engine.run(request, num_new_tokens=5)
    for shard in engine.shards:
        assert shard.flush(WAIT_S)
    return request


def load(engine: MiniEngine, id_: int, num_blocks: int = 7) -> MiniRequest:
    """A request that finds so many blocks, as it was staged before."""
    staged = engine.cache.stage(HASHES)
    request = MiniRequest(id_, list(PROMPT))
    num_loaded = engine.run(request, num_new_tokens=5)
    engine.cache.release(staged)
    assert (staged.num_blocks, num_loaded) == (num_blocks, num_blocks * SIZE)
    return request


def check_quiet(engine: MiniEngine) -> None:
    for _ in range(2):
        engine.turn()
    for shard in (*sharded(engine).shards, *engine.shards):
        assert shard.flush(WAIT_S)
        await_true(lambda: shard.stats().host.leased_slots == 0)  # noqa: B023
    assert engine.scheduler.connector_faults == 0
    assert [worker.connector_faults for worker in engine.workers] == [0, 0]


def test_what_one_engine_computed_another_one_loads_on_every_rank(config: CacheConfig) -> None:
    with owner_process(config.host), engine_of(config) as first, engine_of(config) as second:
        answer = compute(first)
        assert load(second, 2).tokens == answer.tokens
        assert second.shards[1].stats().staged_blocks == 0, "rank 1 asks for nothing"
        stats = second.cache.stats()
        assert (stats.staged_blocks, stats.peer_blocks, stats.fetched_blocks) == (7, 7, 0)
        check_quiet(first)
        check_quiet(second)


def test_rank_0_brings_the_shards_of_all_ranks_from_the_store(config: CacheConfig) -> None:
    with owner_process(config.host), engine_of(config) as first:
        answer = compute(first)
    empty = config.host.model_copy(update={"name": "another"})
    other = config.model_copy(update={"host": empty})
    with owner_process(empty), engine_of(other) as second:
        assert load(second, 2).tokens == answer.tokens
        assert second.cache.stats().fetched_blocks == 7
        check_quiet(second)


def test_an_owner_killed_between_match_and_load_harms_nobody(config: CacheConfig) -> None:
    with owner_process(config.host) as owner, engine_of(config) as engine:
        compute(engine)
        staged = engine.cache.stage(HASHES)
        promised = MiniRequest(2, list(PROMPT))
        engine.start(promised)
        assert promised.num_loaded_tokens == 28
        owner.kill()
        engine.turn(new=(promised,))  # checks what it attends to
        engine.finish(promised)
        engine.cache.release(staged)
        missed = engine.cache.lease(HASHES)
        assert missed.num_blocks == 0
        owner.start()
        await_attached(engine)
        load(engine, 3)
        check_quiet(engine)


def test_an_arena_replaced_between_match_and_load_harms_nobody(config: CacheConfig) -> None:
    """Rank 1 has nothing of the old arena but what it may have to copy from it."""
    with owner_process(config.host) as owner, engine_of(config) as engine:
        compute(engine)
        staged = engine.cache.stage(HASHES)
        promised = MiniRequest(2, list(PROMPT))
        engine.start(promised)
        replace_arena(config, owner)
        await_attached(engine)
        engine.turn(new=(promised,))
        engine.finish(promised)
        engine.cache.release(staged)
        load(engine, 3)  # from the store, through the new arena
        check_quiet(engine)


def replace_arena(config: CacheConfig, owner: OwnerProcess) -> None:
    owner.kill()
    paths_of(config.host).arena.unlink()
    owner.start()


def await_attached(engine: MiniEngine) -> None:
    """Every connection of the engine has the owner that runs now."""
    for shard in (*sharded(engine).shards, *engine.shards):
        await_true(lambda: shard.stats().host.is_connected)  # noqa: B023
    await_stock(engine)
