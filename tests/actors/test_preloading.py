"""Parts of a prompt on their way to the device while the rest comes, and what the receipt says."""

import asyncio
import threading
from itertools import pairwise

import pytest

from actors.engine import GenerationRequest, SamplingParams
from actors.preloading import MAX_PARTS, PART_BYTES, Parts, Preloading
from actors.replica import EngineReplica
from actors.wanted import NOTHING
from shared_cache.errors import ModelError
from shared_cache.staged import StagedPrefix
from tests.actors.test_replica import collect, make_replica
from tests.fakes import LAYOUT, TOKENS_PER_BLOCK, FakeCache, FakeEngine

NUM_BLOCKS = 8


class ArrivingCache(FakeCache):
    """Blocks come when the test lets them; a prefix is there once its last block is."""

    def __init__(self, *, fetched: int = NUM_BLOCKS) -> None:
        super().__init__(frozenset(range(fetched)))
        self.num_arrived = 0
        self.changed = threading.Condition()

    def grow(self, staged, hashes, deadline_s=None):
        with self.changed:
            assert self.changed.wait_for(lambda: self.num_arrived >= len(hashes), 20)
        return super().grow(staged, hashes, deadline_s)

    def arrive(self, num_blocks: int) -> None:
        with self.changed:
            self.num_arrived = num_blocks
            self.changed.notify_all()


class Loads:
    """An engine's `preload`: notes what it is asked for, and has it all on the device then."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.asked: list[int] = []
        self.error: Exception | None = None
        self.num_loaded = 0
        self.is_late = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, request: GenerationRequest, num_blocks: int) -> range:
        self.asked.append(num_blocks)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        num_tokens = num_blocks * TOKENS_PER_BLOCK
        self.engine.receipt = (num_tokens, NUM_BLOCKS * TOKENS_PER_BLOCK - num_tokens)
        num_before = max(self.num_loaded, self.engine.num_on_device * TOKENS_PER_BLOCK)
        self.num_loaded = num_tokens
        return range(0 if self.is_late else num_before, 0 if self.is_late else num_tokens)


async def until(is_true) -> None:
    for _ in range(5000):
        if is_true():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came")


@pytest.fixture
async def made(monkeypatch):
    """A replica whose parts are of two blocks, its cache, and its engine's loads."""
    monkeypatch.setattr("actors.preloading.PART_BYTES", 2 * LAYOUT.block_bytes)
    cache = ArrivingCache()
    engine = FakeEngine(cache=cache, receipt=(0, NUM_BLOCKS * TOKENS_PER_BLOCK))
    engine.preload = Loads(engine)
    return await make_replica(engine), cache, engine.preload


def asked(replica: EngineReplica) -> asyncio.Task:
    prompt = tuple(range(NUM_BLOCKS * TOKENS_PER_BLOCK + 1))
    request = GenerationRequest("r", prompt, SamplingParams(3))
    return asyncio.create_task(collect(replica.generate(request)))


async def test_each_part_goes_to_the_device_as_soon_as_it_is_here(made):
    replica, cache, loads = made
    answer = asked(replica)
    for num_blocks in (2, 4, 6):
        await asyncio.sleep(0.02)
        assert len(loads.asked) == num_blocks // 2 - 1
        cache.arrive(num_blocks)
        await until(lambda n=num_blocks: len(loads.asked) == n // 2)
    assert not answer.done()
    cache.arrive(NUM_BLOCKS)
    receipt = (await answer)[0].receipt
    assert loads.asked == [2, 4, 6], "the rest is the request's own"
    assert (receipt.device, receipt.host, receipt.shared, receipt.computed) == (0, 0, 32, 1)
    assert not cache.leased


async def test_what_was_here_before_is_told_as_host(made):
    replica, cache, _ = made
    cache.host.num_present = 2
    cache.fetched = frozenset(range(2, NUM_BLOCKS))
    answer = asked(replica)
    cache.arrive(NUM_BLOCKS)
    receipt = (await answer)[0].receipt
    assert (receipt.device, receipt.host, receipt.shared) == (0, 8, 24)


async def test_what_the_device_had_before_is_told_as_device(made):
    replica, cache, loads = made
    loads.engine.num_on_device = 2
    cache.fetched = frozenset(range(2, NUM_BLOCKS))
    answer = asked(replica)
    cache.arrive(6)
    await until(lambda: len(loads.asked) == 2)
    cache.arrive(NUM_BLOCKS)
    receipt = (await answer)[0].receipt
    assert loads.asked == [4, 6]
    assert (receipt.device, receipt.host, receipt.shared) == (8, 0, 24)


async def test_what_was_loaded_for_another_request_is_told_as_device(made):
    replica, cache, loads = made
    loads.is_late = True
    answer = asked(replica)
    cache.arrive(6)
    await until(lambda: len(loads.asked) == 3)
    cache.arrive(NUM_BLOCKS)
    receipt = (await answer)[0].receipt
    assert (receipt.device, receipt.host, receipt.shared, receipt.computed) == (24, 0, 8, 1)


async def test_no_part_begins_once_all_is_here(made):
    replica, cache, loads = made
    loads.gate.clear()
    answer = asked(replica)
    cache.arrive(2)
    await until(lambda: loads.asked)
    cache.arrive(NUM_BLOCKS)
    await until(lambda: loads.engine.requests)
    loads.gate.set()
    await answer
    assert loads.asked == [2]
    assert not cache.leased


async def test_no_tier_is_asked_for_a_part_once_all_is_here():
    """It would ask anew, as nobody fetches any more what did not come."""
    cache = FakeCache()
    prompt = tuple(range(NUM_BLOCKS * TOKENS_PER_BLOCK + 1))
    ahead = Preloading(cache, GenerationRequest("r", prompt, SamplingParams(3)), TOKENS_PER_BLOCK)
    ends = []

    async def staging(end: int) -> StagedPrefix:
        ends.append(end)
        return cache.grow(NOTHING, list(range(end)), 1.0)

    async def preload(request: GenerationRequest, num_blocks: int) -> range:
        ahead.enough()
        return range(num_blocks * TOKENS_PER_BLOCK)

    ahead.start(preload, Parts(0, NUM_BLOCKS, PART_BYTES // 2), staging)
    await until(lambda: ahead.loaded)
    await until(lambda: not cache.leased)
    await ahead.stop()
    assert ends == [2]


async def test_what_was_loaded_ahead_is_told_by_its_tier_though_its_request_stood_in_line(made):
    """Its blocks are looked up once more when it is its turn: then the device has some of them."""
    replica, cache, loads = made
    places = replica._staging._places
    answer = asked(replica)
    cache.arrive(6)
    await until(lambda: len(loads.asked) == 3)
    taken = 0
    while not places.locked():
        await places.acquire()
        taken += 1
    cache.arrive(NUM_BLOCKS)
    await until(lambda: places._waiters)
    cache.host.num_present = NUM_BLOCKS
    loads.engine.num_on_device = 6
    for _ in range(taken):
        places.release()
    receipt = (await answer)[0].receipt
    assert (receipt.device, receipt.host, receipt.shared, receipt.computed) == (0, 0, 32, 1)


async def test_what_has_come_meanwhile_goes_in_one_part():
    cache = FakeCache()
    prompt = tuple(range(NUM_BLOCKS * TOKENS_PER_BLOCK + 1))
    ahead = Preloading(cache, GenerationRequest("r", prompt, SamplingParams(3)), TOKENS_PER_BLOCK)
    loaded = []

    async def staging(end: int) -> StagedPrefix:
        here = {2: 2, 4: 5}.get(end, end)  # more came while the first one was loaded
        return cache.grow(NOTHING, list(range(here)), 1.0)

    async def preload(request: GenerationRequest, num_blocks: int) -> range:
        start, *_ = [*loaded[-1:], 0]
        loaded.append(num_blocks)
        return range(start * TOKENS_PER_BLOCK, num_blocks * TOKENS_PER_BLOCK)

    ahead.start(preload, Parts(0, NUM_BLOCKS, PART_BYTES // 2), staging)
    await until(lambda: len(loaded) == 3)
    await ahead.stop()
    assert loaded == [2, 5, 7]
    assert ahead.loaded == range(7)
    assert not cache.leased


@pytest.mark.parametrize("error", [ModelError("out of memory"), RuntimeError("bug")])
async def test_a_load_that_fails_costs_the_request_nothing(error, made):
    replica, cache, loads = made
    loads.error = error
    answer = asked(replica)
    cache.arrive(NUM_BLOCKS)
    receipt = (await answer)[0].receipt
    assert (receipt.device, receipt.shared) == (0, 32)
    assert not cache.leased


async def test_leaving_ends_it(made):
    replica, cache, loads = made
    loads.gate.clear()
    answer = asked(replica)
    cache.arrive(4)
    await until(lambda: loads.asked)
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    cache.arrive(NUM_BLOCKS)
    await until(lambda: not cache.leased)
    assert loads.asked == [2]


@pytest.mark.parametrize(
    ("num_blocks", "sizes"),
    [
        (1, [1]),
        (32, [32]),
        (65, [32, 32, 1]),
        (255, [32] * 7 + [31]),
        (511, [64] * 6 + [32] * 3 + [31]),
        (1023, [128] * 6 + [32] * 7 + [31]),
    ],
)
def test_parts_are_large_and_few_and_short_at_the_end(num_blocks, sizes):
    parts = Parts(5, 5 + num_blocks, 4 << 20)
    ends = [5]
    while (end := parts.next_end(ends[-1])) is not None:
        ends.append(end)
    assert [end - start for start, end in pairwise([*ends, 5 + num_blocks])] == sizes
    assert len(sizes) < 2 * MAX_PARTS


def test_a_block_may_be_larger_than_a_part():
    parts = Parts(0, 3, 2 * PART_BYTES)
    assert [parts.next_end(position) for position in range(3)] == [1, 2, None]
