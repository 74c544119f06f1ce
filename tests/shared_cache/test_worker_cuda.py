"""The worker on a real GPU: copies are ordered with the forward passes though nobody waits."""

import gc
import threading
from array import array
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from shared_cache.config import CacheConfig
from shared_cache.connector.transfers import Load, SaveRun, TransferPlan, pack_loads
from shared_cache.connector.worker import SharedCacheWorker
from shared_cache.hashing import BlockHash, BlockHashChain
from shared_cache.host.interface import Place
from shared_cache.host.local import LocalHostTier
from shared_cache.staging import SharedCache
from tests.shared_cache.fakes import WAIT_S, await_published, num_in_host

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BLOCK_BYTES = 1 << 20
NUM_SLOTS = 200
BLOCKS_PER_TURN = 4
NUM_TURNS = 30
SLOW_CYCLES = 5_000_000


@pytest.fixture
def cache() -> Iterator[SharedCache]:
    cache = SharedCache(LocalHostTier(NUM_SLOTS * BLOCK_BYTES, BLOCK_BYTES), (), CacheConfig())
    yield cache
    cache.close()


@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize("is_pinned", [False, True])
def test_no_turn_sees_the_bytes_of_another(
    cache: SharedCache, monkeypatch: pytest.MonkeyPatch, is_pinned: bool, own_stream: bool
) -> None:
    """A pass reads loaded rows first and last. A load goes to rows that the last, still running,
    pass reads; a pass writes at once to the rows that the last turn is still saving. Every second
    turn loads nothing, as waiting for a load would hide that the save is not waited for.
    """
    if not is_pinned:  # as where the driver refuses
        monkeypatch.setattr(cache.host, "show_memory", lambda hook: None)
    pool = torch.zeros((2 * BLOCKS_PER_TURN, BLOCK_BYTES), dtype=torch.uint8, device="cuda")
    seen = torch.zeros((NUM_TURNS, 2, *pool[BLOCKS_PER_TURN:].shape), dtype=torch.uint8).cuda()
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    torch.cuda.synchronize()
    worker = SharedCacheWorker(cache)
    worker.register_kv_caches(pool)
    sources = fill_sources(cache)
    for turn in range(NUM_TURNS):
        worker.bind_connector_meta(plan_of(turn, sources))
        worker.start_load_kv(stream)
        with torch.cuda.stream(stream):
            seen[turn, 0].copy_(pool[BLOCKS_PER_TURN:])
            pool[:BLOCKS_PER_TURN].fill_(turn + 1)
            torch.cuda._sleep(SLOW_CYCLES)
            seen[turn, 1].copy_(pool[BLOCKS_PER_TURN:])
        worker.wait_for_save(stream)
    worker.close()
    torch.cuda.synchronize()
    await_published(cache)
    assert worker.connector_faults == 0
    for turn in range(NUM_TURNS):
        for index, slot in enumerate(slots_of(turn, sources)):
            assert (seen[turn, :, index] == mark_of(slot)).all()
        lease = cache.host.lease(hashes_of(turn))
        assert len(lease.slots) == BLOCKS_PER_TURN
        for slot in lease.slots:
            assert (np.frombuffer(cache.host.buffer(slot), np.uint8) == turn + 1).all()
        cache.host.release(lease)


def test_the_engine_waits_for_no_save_when_memory_is_pinned(cache: SharedCache) -> None:
    """`wait_for_save` returns while the pass still runs; `close` waits for the blocks."""
    pool = torch.zeros((2 * BLOCKS_PER_TURN, BLOCK_BYTES), dtype=torch.uint8, device="cuda")
    worker = SharedCacheWorker(cache)
    worker.register_kv_caches(pool)
    worker.bind_connector_meta(TransferPlan(saves=plan_of(0, ()).saves))
    stream = torch.cuda.current_stream()
    worker.start_load_kv(stream)
    torch.cuda._sleep(100 * SLOW_CYCLES)
    worker.wait_for_save(stream)
    assert not stream.query()
    assert num_in_host(cache, hashes_of(0)) == 0
    worker.close()
    await_published(cache)
    assert num_in_host(cache, hashes_of(0)) == BLOCKS_PER_TURN


def test_a_worker_that_nobody_holds_frees_the_pool(
    cache: SharedCache, caplog: pytest.LogCaptureFixture
) -> None:
    """TensorRT-LLM closes no worker; the one that comes next pins the same memory again."""
    for _ in range(2):
        gc.collect()
        before, others = torch.cuda.memory_allocated(), set(threading.enumerate())
        pool = torch.zeros((2 * BLOCKS_PER_TURN, BLOCK_BYTES), dtype=torch.uint8, device="cuda")
        worker = SharedCacheWorker(cache)
        worker.register_kv_caches(pool)
        started = set(threading.enumerate()) - others
        (thread,) = [one for one in started if one.name == "kvcommons-copied"]
        worker.bind_connector_meta(TransferPlan(saves=plan_of(0, ()).saves))
        worker.start_load_kv(torch.cuda.current_stream())
        worker.wait_for_save(torch.cuda.current_stream())
        del worker, pool
        await_published(cache)
        gc.collect()
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert torch.cuda.memory_allocated() == before
    assert "does not pin" not in caplog.text


def hashes_of(turn: int) -> list[BlockHash]:
    return BlockHashChain(1, tokens=range(turn * 100, turn * 100 + BLOCKS_PER_TURN)).hashes


def fill_sources(cache: SharedCache) -> tuple[int, ...]:
    """Reserved host slots, each full of its own mark."""
    slots = cache.host.reserve(2 * BLOCKS_PER_TURN)
    for slot in slots:
        np.frombuffer(cache.host.buffer(slot), np.uint8)[:] = mark_of(slot)
    return slots


def mark_of(slot: int) -> int:
    """A byte that only this source's slot is full of; slots are numbers of 4 KiB."""
    return slot // (BLOCK_BYTES // 4096) + 1


def slots_of(turn: int, sources: tuple[int, ...]) -> tuple[int, ...]:
    """The host slots whose bytes turn `turn` must see; loaded in it or, if it is odd, before it."""
    start = turn // 2 % 2 * BLOCKS_PER_TURN
    return sources[start : start + BLOCKS_PER_TURN]


def plan_of(turn: int, sources: tuple[int, ...]) -> TransferPlan:
    loads = []
    if sources and turn % 2 == 0:
        numbers = [slot // (BLOCK_BYTES // 4096) for slot in slots_of(turn, sources)]
        place = Place(b"", array("I", numbers))
        loads.append(Load([place], range(BLOCKS_PER_TURN, 2 * BLOCKS_PER_TURN)))
    hashes = hashes_of(turn)
    blocks = array("I", range(BLOCKS_PER_TURN)).tobytes()
    return TransferPlan(pack_loads(loads), (SaveRun(hashes[0], b"".join(hashes), blocks),))
