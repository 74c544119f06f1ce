"""Stores that hang: it costs a deadline, then nothing, and they are used again once they are back.

Also when the call that hung never returns, although the store answers others by now.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from shared_cache.checksum import block_checksum
from shared_cache.config import HostConfig
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import NewRun
from shared_cache.host.node import NodeHostTier, open_node_tier
from shared_cache.staging import SharedCache
from tests.shared_cache.arenas import await_true, host_config, memory_folder, owner_process
from tests.shared_cache.fakes import (
    BLOCK_BYTES,
    WAIT_S,
    FakeClock,
    Gate,
    ScriptedStore,
    chain_of,
    make_cache,
    payload_of,
    run_of,
    save_blocks,
)

CHAIN = chain_of(6)
HASHES = CHAIN.hashes
NUM_THREADS = 2
PATIENCE_S = 1.0
"""What the reads and writes of these stores may take, by a clock that stands still."""


class Outage:
    """A hook that keeps all calls of its kind while it lasts; some of them for ever after."""

    def __init__(self) -> None:
        self.num_held = 0
        self.is_over = False
        self.last_words = Gate()

    def __call__(self, *_: object) -> None:
        if not self.is_over:
            self.num_held += 1
            self.last_words()


@pytest.fixture
def outage() -> Iterator[Outage]:
    outage = Outage()
    yield outage
    outage.last_words.open()


def open_hanging(
    outage: Outage, hook: str, clock: FakeClock, num_blocks: int
) -> tuple[SharedCache, ScriptedStore]:
    store = ScriptedStore()
    if num_blocks:
        store.write(run_of(chain_of(num_blocks)))
    setattr(store, hook, outage)
    tier = {"timeout_s": PATIENCE_S}
    deadline_s = {"staging_deadline_s": PATIENCE_S}
    return make_cache(store, clock=clock, tier=tier, io_threads=NUM_THREADS, **deadline_s), store


def staged(cache: SharedCache, hashes: list[BlockHash], deadline_s: float) -> int:
    prefix = cache.stage(hashes, deadline_s)
    for slot, block_hash in zip(prefix.lease.slots, hashes, strict=False):
        assert bytes(cache.host.buffer(slot)) == payload_of(block_hash)
    cache.release(prefix)
    return prefix.num_blocks


@pytest.mark.parametrize("hook", ["on_match", "on_read"])
@pytest.mark.parametrize("num_stuck", [1, NUM_THREADS + 1])
def test_a_store_whose_reads_hang_costs_one_deadline_and_is_used_again_once_it_is_back(
    outage: Outage, hook: str, num_stuck: int
) -> None:
    clock = FakeClock()
    cache, _ = open_hanging(outage, hook, clock, len(HASHES))
    for index in range(num_stuck):  # more than there are threads: the others wait for one
        other = HASHES if index == 0 else chain_of(6, first_token=1000 * index).hashes
        assert staged(cache, other, 0.02) == 0
    outage.last_words.wait_entered()
    clock.now_s += PATIENCE_S
    before_s = time.monotonic()
    for _ in range(50):
        assert staged(cache, HASHES, WAIT_S) == 0
    assert time.monotonic() - before_s < WAIT_S / 4, "nobody waits for it any more"
    outage.is_over = True  # and those that are held are held for ever
    clock.now_s += 2 * PATIENCE_S
    await_true(lambda: staged(cache, HASHES, WAIT_S) == len(HASHES))
    assert cache.stats().host.leased_slots == 0
    outage.last_words.open()
    cache.close()


@pytest.mark.parametrize("num_runs", [1, 8])
def test_a_store_whose_writes_hang_is_written_again_once_it_is_back(
    outage: Outage, num_runs: int
) -> None:
    """Nobody has to ask for it: what waits in the queue is written, in other threads."""
    clock = FakeClock()
    cache, store = open_hanging(outage, "on_write", clock, 0)
    chains = [chain_of(2, first_token=1000 * index) for index in range(num_runs)]
    for chain in chains:
        save_blocks(cache, chain, 0, 2)
    outage.last_words.wait_entered()
    await_true(lambda: outage.num_held >= min(num_runs, NUM_THREADS))
    clock.now_s += PATIENCE_S
    assert not cache.flush(0.02)
    outage.is_over = True
    clock.now_s += 10 * PATIENCE_S
    assert cache.flush(WAIT_S), "writes that are lost are given up, the others written"
    stats = cache.stats()
    num_lost = 2 * min(num_runs, NUM_THREADS)
    assert (stats.dropped_saves, stats.saved_blocks) == (num_lost, 2 * num_runs - num_lost)
    assert stats.host.leased_slots == num_lost, "as long as the lost calls may read them"
    save_blocks(cache, chain_of(3, first_token=90_000), 0, 3)
    assert cache.flush(WAIT_S)
    assert store.match(chain_of(3, first_token=90_000).hashes) == 3
    outage.last_words.open()
    await_true(lambda: cache.stats().host.leased_slots == 0)
    cache.close()


def test_closing_takes_one_deadline_however_much_hangs(outage: Outage) -> None:
    near, far = ScriptedStore(), ScriptedStore()
    near.on_write = far.on_write = outage
    near.on_match = far.on_match = outage
    near.close = far.close = outage  # type: ignore[method-assign]
    cache = make_cache(near, far, io_threads=NUM_THREADS)
    save_blocks(cache, CHAIN, 0, 6)
    assert staged(cache, chain_of(3, first_token=1000).hashes, 0.02) == 0
    await_true(lambda: outage.num_held >= 3)
    before_s = time.monotonic()
    cache.close(0.3)
    assert time.monotonic() - before_s < 2


def test_a_store_that_hangs_while_it_is_closed_is_left_behind(outage: Outage) -> None:
    store = ScriptedStore()
    store.close = outage  # type: ignore[method-assign]
    cache = make_cache(store)
    before_s = time.monotonic()
    cache.close(0.2)
    assert time.monotonic() - before_s < 2
    assert outage.num_held == 1


@pytest.fixture
def host() -> Iterator[HostConfig]:
    with memory_folder() as folder:
        config = host_config(folder)
        with owner_process(config):
            yield config


def test_a_read_that_hangs_while_the_cache_is_closed_writes_into_nobodys_blocks(
    host: HostConfig, outage: Outage
) -> None:
    """The other process takes all slots there are; the late bytes must go into none of them."""
    store = ScriptedStore()
    store.write(run_of(CHAIN))
    store.on_read = outage
    others = set(threading.enumerate())
    with ExitStack() as stack:
        cache = make_cache(store, host_tier=_tier(host), io_threads=1)
        assert staged(cache, HASHES, 0.05) == 0
        outage.last_words.wait_entered()
        cache.close(0.1)
        other = _tier(host)
        stack.callback(other.close)
        theirs = _fill(other)
        outage.last_words.open()
        await_true(lambda: not _threads("kvcommons-fetch", others))
        lease = other.lease_held(theirs)
        assert len(lease.slots) == len(theirs)
        wrong = [
            slot
            for slot, block_hash in zip(lease.slots, theirs, strict=True)
            if block_checksum(block_hash, other.buffer(slot)) != other.checksum(slot)
        ]
        assert wrong == []
        await_true(lambda: not _threads("kvcommons-close", others))
        assert other.stats().reserved_slots <= 64, "and then its memory is given back"


def _tier(host: HostConfig) -> NodeHostTier:
    return open_node_tier(host, "namespace", BLOCK_BYTES, "always")


def _threads(name: str, others: set[threading.Thread]) -> list[threading.Thread]:
    ours = set(threading.enumerate()) - others
    return [thread for thread in ours if thread.name.startswith(name)]


def _fill(tier: NodeHostTier) -> list[BlockHash]:
    """Blocks in all the memory that can be had."""
    hashes: list[BlockHash] = []
    slots: tuple[int, ...] = (0,)
    while slots:
        chain = chain_of(64, first_token=100_000 + 1000 * len(hashes)).hashes
        slots = tier.reserve(len(chain)) or tier.claim(chain, 0).slots
        for slot, block_hash in zip(slots, chain, strict=False):
            tier.buffer(slot)[:] = payload_of(block_hash)
        run = NewRun(BlockHash(bytes(32)), tuple(chain[: len(slots)]))
        if slots:
            tier.commit(slots, run)  # leased from now on: nothing is evicted
        hashes += chain[: len(slots)]
    return hashes
