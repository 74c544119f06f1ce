"""Loads that are done beside running requests, and saves that outlive theirs."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from actors.engine import TokenChunk
from actors.engines.torch.engine import TorchEngine
from actors.engines.torch.pool import PagedPool
from shared_cache.config import CacheConfig
from shared_cache.connector.copier import CpuCopier
from shared_cache.connector.copies import BlockLoad, OnLoaded
from shared_cache.connector.scheduler import SharedCacheScheduler
from shared_cache.connector.worker import SharedCacheWorker
from shared_cache.errors import ModelError
from shared_cache.hashing import block_hashes
from shared_cache.namespace import Namespace
from shared_cache.opening import open_cache
from shared_cache.staging import SharedCache
from tests.engine.conftest import (
    BLOCK,
    HOST,
    Greedy,
    MakeEngine,
    chunks,
    request,
    some_prompt,
    tokens,
)

LOOPS = ("plain", "overlapped")

PROMPT = some_prompt(6 * BLOCK + 3)
OTHER = some_prompt(2 * BLOCK, seed=5)
PATIENCE_S = 60.0


class HeldCopier(CpuCopier):
    """Copies blocks beside running requests only when the test says so."""

    def __init__(self, rows: Any) -> None:
        super().__init__(rows)
        self.held: list[tuple[Sequence[BlockLoad], OnLoaded | None]] = []
        self.num_let_go = 0
        self.fails = False
        self.holds = True

    def load_beside(
        self, loads: Sequence[BlockLoad], stream: Any, on_done: OnLoaded | None = None
    ) -> Callable[[], bool]:
        if self.fails:
            raise RuntimeError("the device is on fire")
        if not self.holds:
            return super().load_beside(loads, stream, on_done)
        self.held.append((loads, on_done))
        number = len(self.held)
        return lambda: self.num_let_go >= number

    def let_go(self) -> None:
        done = self.held[self.num_let_go :]
        for loads, _ in done:
            self.load(loads, None)
        self.num_let_go += len(done)
        for _, on_done in done:
            if on_done is not None:
                on_done()


class Replicas:
    """Engines over one cache in host memory; loads of any length are done ahead."""

    def __init__(self, make: MakeEngine) -> None:
        self._make = make
        self.cache: SharedCache | None = None
        self.copier: HeldCopier

    def engine(self, **settings: Any) -> TorchEngine:
        return self._make(self._pair, **settings)

    def _pair(self, pool: PagedPool) -> tuple[Any, Any]:
        if self.cache is None:
            space = Namespace("tiny", "0", "torch", pool.layout)
            self.cache = open_cache(CacheConfig(host=HOST), space)
        worker = SharedCacheWorker(self.cache, is_told_of_writes=True)
        worker.register_kv_caches(pool.tensor)
        rows = pool.tensor.view(len(pool.tensor), -1).view(torch.uint8)
        self.copier = HeldCopier(rows)
        worker._copier = self.copier
        scheduler = SharedCacheScheduler(self.cache, BLOCK, ahead_from_blocks=1, holds_unsaved=True)
        return scheduler, worker


@pytest.fixture
def replicas(make_connected_engine: MakeEngine) -> Iterator[Replicas]:
    made = Replicas(make_connected_engine)
    yield made
    if made.cache is not None:
        made.cache.close()


async def until(is_true: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline_s, "it never came"
        await asyncio.sleep(0.001)


async def saved(replicas: Replicas) -> None:
    """Another engine computes the prompt and leaves it in host memory."""
    engine = replicas.engine()
    await tokens(engine, request(PROMPT, 1))
    assert replicas.cache is not None
    assert replicas.cache.flush(PATIENCE_S)


async def loading(replicas: Replicas) -> tuple[TorchEngine, asyncio.Task[list[TokenChunk]]]:
    """An engine, and its request that waits for a prefix which another one has saved."""
    await saved(replicas)
    engine = replicas.engine()
    waiting = asyncio.create_task(chunks(engine, request(PROMPT)))
    await until(lambda: replicas.copier.held)
    return engine, waiting


def used(engine: TorchEngine) -> int:
    return engine.stats().kv_cache.used_num_blocks


async def test_others_go_on_while_a_prefix_is_loaded(
    replicas: Replicas, plain_greedy: Greedy
) -> None:
    engine, waiting = await loading(replicas)
    assert await tokens(engine, request(OTHER)) == plain_greedy(OTHER, 12)
    assert not waiting.done()
    replicas.copier.let_go()
    received = await waiting
    assert received[0].receipt is not None
    assert received[0].receipt.host == 6 * BLOCK
    assert [t for chunk in received for t in chunk.token_ids] == plain_greedy(PROMPT, 12)
    await until(lambda: used(engine) == 0)


async def test_who_wants_the_same_prefix_waits_for_that_load(
    replicas: Replicas, plain_greedy: Greedy
) -> None:
    engine, first = await loading(replicas)
    second = asyncio.create_task(chunks(engine, request(PROMPT, request_id="second")))
    await tokens(engine, request(OTHER, 3))  # there were turns in which it could have begun
    replicas.copier.let_go()
    for received in (await first, await second):
        assert [t for chunk in received for t in chunk.token_ids] == plain_greedy(PROMPT, 12)
    receipt = (await second)[0].receipt
    assert receipt is not None
    assert receipt.device == 6 * BLOCK
    assert len(replicas.copier.held) == 1


async def test_slots_of_an_aborted_request_are_kept_until_its_load_is_done(
    replicas: Replicas, plain_greedy: Greedy
) -> None:
    engine, waiting = await loading(replicas)
    waiting.cancel()
    await until(lambda: engine.stats().num_running == 0)
    assert await tokens(engine, request(OTHER)) == plain_greedy(OTHER, 12)
    assert used(engine) == 7, "the load still writes to them"
    replicas.copier.let_go()
    await until(lambda: used(engine) == 0)
    replicas.copier.holds = False
    assert await tokens(engine, request(OTHER)) == plain_greedy(OTHER, 12)


async def test_a_load_that_fails_fails_its_request_alone(
    replicas: Replicas, plain_greedy: Greedy
) -> None:
    await saved(replicas)
    engine = replicas.engine()
    replicas.copier.fails = True
    with pytest.raises(ModelError, match="on fire"):
        await tokens(engine, request(PROMPT))
    assert await tokens(engine, request(OTHER)) == plain_greedy(OTHER, 12)
    await until(lambda: used(engine) == 0)


async def test_what_finds_no_room_in_a_turn_is_saved_in_later_ones(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request has ended by then: its blocks are kept for that, and no block is lost."""
    engine = replicas.engine()
    assert replicas.cache is not None
    host = replicas.cache.host
    monkeypatch.setattr(type(host), "num_reserved_ahead", property(lambda _: 1))
    await tokens(engine, request(PROMPT, 1))
    assert engine._connector is not None
    await until(lambda: used(engine) == 0)
    assert replicas.cache.flush(PATIENCE_S)
    lease = host.lease(block_hashes(PROMPT, BLOCK))
    assert len(lease.slots) == 6
    host.release(lease)
    assert replicas.cache.stats().dropped_saves == 0


async def test_blocks_are_not_kept_for_ever_for_memory_that_never_comes(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared_cache.connector.held_runs.LEAVING_S", 0.2)
    engine = replicas.engine()
    assert replicas.cache is not None
    monkeypatch.setattr(type(replicas.cache.host), "num_reserved_ahead", property(lambda _: 0))
    await tokens(engine, request(PROMPT, 1))
    await until(lambda: used(engine) == 0)
    await until(lambda: replicas.cache is not None and replicas.cache.stats().dropped_saves == 6)


def test_flushing_waits_for_what_ended_requests_have_left(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = replicas.engine()
    assert replicas.cache is not None
    monkeypatch.setattr(type(replicas.cache.host), "num_reserved_ahead", property(lambda _: 1))
    engine.cache = replicas.cache
    asyncio.run(tokens(engine, request(PROMPT, 1)))
    assert engine.flush(PATIENCE_S)
    lease = replicas.cache.host.lease(block_hashes(PROMPT, BLOCK))
    assert len(lease.slots) == 6
    replicas.cache.host.release(lease)
