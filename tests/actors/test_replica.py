"""A replica around a fake engine: admission, tiers, leases, health, drain."""

import asyncio
import threading
from contextlib import aclosing

import pytest

from actors.admission import LOOK_UP_THREADS, MAX_FETCHING, STAGED_BATCHES, StagingQueue
from actors.config import EngineConfig, ModelSource, ReplicaConfig
from actors.engine import GenerationRequest, SamplingParams
from actors.replica import EngineReplica
from actors.wire.client import WireClient
from shared_cache.errors import (
    ModelError,
    ReplicaBusyError,
    ReplicaRefusedError,
    ReplicaUnavailableError,
    RequestError,
)
from shared_cache.hashing import ReuseScope, block_hashes
from tests.fakes import TOKENS_PER_BLOCK, FakeCache, FakeEngine

CONFIG = ReplicaConfig(name="replica-0", model=ModelSource(name="m", path="p", revision="r"))


async def make_replica(engine: FakeEngine, config=CONFIG, **options) -> EngineReplica:
    replica = EngineReplica(config, lambda _: engine, **options)
    await replica.ready()
    return replica


def request(num_prompt=10, max_tokens=6, **fields) -> GenerationRequest:
    return GenerationRequest("r", tuple(range(num_prompt)), SamplingParams(max_tokens), **fields)


async def collect(stream):
    async with aclosing(stream):
        return [item async for item in stream]


@pytest.mark.parametrize(("num_prompt", "num_staged"), [(13, 3), (12, 2), (9, 2), (5, 1)])
async def test_stages_whole_blocks_and_leaves_a_token_to_compute(num_prompt, num_staged):
    cache, scope = FakeCache(), ReuseScope(cache_salt="tenant")
    replica = await make_replica(FakeEngine(cache=cache))
    await collect(replica.generate(request(num_prompt, scope=scope)))
    expected = block_hashes(range(num_prompt), TOKENS_PER_BLOCK, scope)[:num_staged]
    assert cache.staged == [expected]
    assert not cache.leased


async def test_stages_nothing_for_a_short_prompt_or_without_a_cache():
    cache = FakeCache()
    await collect((await make_replica(FakeEngine(cache=cache))).generate(request(4)))
    assert cache.staged == []
    chunks = await collect((await make_replica(FakeEngine())).generate(request(40)))
    assert chunks[0].receipt.computed == 40


@pytest.mark.parametrize(
    ("fetched", "device", "loaded", "host", "shared"),
    [
        ({0, 1, 2, 3, 4}, 0, 5, 0, 20),
        ({3, 4}, 0, 5, 12, 8),
        ({0, 1, 4}, 2, 3, 8, 4),  # blocks 0 and 1 were fetched but found on the device
        ({0, 4}, 1, 2, 8, 0),  # block 4 was fetched but not loaded
        ({2, 3}, 2, 3, 4, 8),  # staged from block 2 on, where the device's blocks end
        (set(), 2, 3, 12, 0),
    ],
)
async def test_receipt_splits_loaded_tokens_by_tier(fetched, device, loaded, host, shared):
    cache = FakeCache(frozenset(fetched))
    engine = FakeEngine(cache=cache, receipt=(device * TOKENS_PER_BLOCK, loaded * TOKENS_PER_BLOCK))
    chunks = await collect((await make_replica(engine)).generate(request(22)))
    receipt = chunks[0].receipt
    assert (receipt.device, receipt.host, receipt.shared) == (device * 4, host, shared)
    total = receipt.device + receipt.host + receipt.shared + receipt.computed
    assert total == receipt.prompt_tokens == 22
    assert all(chunk.receipt is None for chunk in chunks[1:])


async def test_lease_ends_with_the_first_chunk():
    cache = FakeCache()
    stream = (await make_replica(FakeEngine(cache=cache))).generate(request())
    await anext(stream)
    assert not cache.leased
    await stream.aclose()


async def test_lease_ends_when_the_engine_refuses():
    cache = FakeCache()
    replica = await make_replica(FakeEngine(cache=cache, max_total_tokens=12))
    with pytest.raises(RequestError):
        await collect(replica.generate(request(10, max_tokens=6)))
    assert cache.staged
    assert not cache.leased


async def test_lease_ends_when_the_client_leaves_during_staging():
    class SlowCache(FakeCache):
        entered, go_on = threading.Event(), threading.Event()

        def grow(self, staged, hashes, deadline_s=None):
            self.entered.set()
            assert self.go_on.wait(10)
            grown = super().grow(staged, hashes, deadline_s)
            self.grown_lease_id = grown.lease.lease_id
            return grown

        def release(self, staged):
            super().release(staged)
            if staged.lease.lease_id == getattr(self, "grown_lease_id", None):
                released.set()

    cache, released = SlowCache(), threading.Event()
    cache.host.num_present = 1
    replica = await make_replica(FakeEngine(cache=cache))
    task = asyncio.create_task(collect(replica.generate(request())))
    assert await asyncio.to_thread(cache.entered.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await replica.stats()).num_outstanding == 0
    cache.go_on.set()
    assert await asyncio.to_thread(released.wait, 10)
    assert not cache.leased


async def test_staging_does_not_block_the_event_loop():
    replica = await make_replica(FakeEngine(cache=FakeCache(stage_s=0.2)))
    task = asyncio.create_task(collect(replica.generate(request())))
    await asyncio.sleep(0)
    await asyncio.wait_for(asyncio.sleep(0.01), 0.15)
    assert not task.done()
    await task


async def started(engine: FakeEngine, num_requests: int) -> None:
    while len(engine.requests) < num_requests:
        await asyncio.sleep(0)


async def test_what_the_device_has_is_not_staged():
    cache, engine = FakeCache(), FakeEngine()
    engine.cache, engine.num_on_device = cache, 2
    replica = await make_replica(engine)
    await collect(replica.generate(request(13)))
    assert cache.staged == [block_hashes(range(13), TOKENS_PER_BLOCK)[2:3]]
    engine.num_on_device = 3
    await collect(replica.generate(request(13)))
    assert len(cache.staged) == 1, "a prefix that is on the device waits for nothing"


class HangingCache(FakeCache):
    """The shared tier answers no earlier than `go_on`."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def grow(self, staged, hashes, deadline_s=None):
        assert self.go_on.wait(10)
        return super().grow(staged, hashes, deadline_s)


async def test_who_has_all_blocks_here_overtakes_any_number_that_wait_for_the_store():
    cache = HangingCache()
    engine = FakeEngine(cache=cache)
    replica = await make_replica(engine)
    misses = [asyncio.create_task(collect(replica.generate(request(13)))) for _ in range(60)]
    await asyncio.sleep(0.05)
    cache.host.num_present = 1
    assert await asyncio.wait_for(collect(replica.generate(request(5))), 5)
    assert len(engine.requests) == 1
    cache.host.num_present = 0
    cache.go_on.set()
    await asyncio.gather(*misses)
    assert not cache.leased


async def test_the_deadline_runs_while_all_threads_are_taken(monkeypatch):
    monkeypatch.setattr("actors.admission.MAX_FETCHING", 1)
    cache = HangingCache()
    cache.deadline_s = 0.05
    queue = StagingQueue("replica-0", 8)
    queue._fetching = asyncio.Semaphore(2)  # one more than threads, so that one waits for a thread
    engine = FakeEngine(cache=cache)
    tasks = [asyncio.create_task(collect(queue.stream(engine, request()))) for _ in range(2)]
    await asyncio.sleep(0.1)
    cache.go_on.set()
    await asyncio.gather(*tasks)
    assert cache.given_s[0] > 0
    assert cache.given_s[1] == 0


async def test_who_waits_for_a_turn_to_fetch_goes_on_when_the_deadline_is_over(monkeypatch):
    """However many stand in front: nobody loses more than one deadline to a store that hangs."""
    monkeypatch.setattr("actors.admission.MAX_FETCHING", 2)
    cache = HangingCache()
    cache.deadline_s = 0.1
    cache.host.num_present = 1
    engine = FakeEngine(cache=cache, receipt=(0, TOKENS_PER_BLOCK))
    replica = await make_replica(engine)
    tasks = [asyncio.create_task(collect(replica.generate(request(13)))) for _ in range(10)]
    for task in tasks[2:]:
        chunks = await asyncio.wait_for(task, 5)
        assert chunks[0].receipt.host == TOKENS_PER_BLOCK, "what is here is loaded all the same"
    assert not tasks[0].done()
    assert cache.given_s == []
    assert cache.num_deadline_misses == 8
    cache.go_on.set()
    await asyncio.gather(*tasks)
    assert len(cache.given_s) == 2
    assert not cache.leased


async def test_nobody_waits_for_tiers_that_are_left_alone():
    cache = HangingCache()
    cache.is_store_usable = False
    replica = await make_replica(FakeEngine(cache=cache))
    await asyncio.wait_for(collect(replica.generate(request(13))), 5)
    assert cache.given_s == []
    assert not cache.leased


class SlowHostCache(FakeCache):
    """The host tier answers no earlier than `go_on`, and not on the event loop."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.num_answered = 0

    def lease(self, hashes, first=0, scope=None):
        assert threading.current_thread() is not threading.main_thread()
        self.entered.set()
        assert self.go_on.wait(10)
        staged = super().lease(hashes, first, scope)
        self.num_answered += 1
        return staged


async def test_a_host_tier_that_does_not_answer_has_nothing_and_its_late_lease_ends(monkeypatch):
    monkeypatch.setattr("actors.admission.LOOK_UP_TIMEOUT_S", 0.05)
    cache = SlowHostCache()
    cache.host.num_present = 100
    cache.is_store_usable = False
    replica = await make_replica(FakeEngine(cache=cache))
    assert await asyncio.wait_for(collect(replica.generate(request(13))), 5)
    cache.go_on.set()
    while not cache.num_answered or cache.leased:
        await asyncio.sleep(0.001)


async def test_look_ups_that_nobody_waits_for_any_more_are_not_done(monkeypatch):
    """A host tier that hangs would otherwise be asked for hours about requests long gone."""
    monkeypatch.setattr("actors.admission.LOOK_UP_TIMEOUT_S", 0.05)
    cache = SlowHostCache()
    cache.is_store_usable = False
    replica = await make_replica(FakeEngine(cache=cache))
    requests = [collect(replica.generate(request(13))) for _ in range(4 * LOOK_UP_THREADS)]
    await asyncio.wait_for(asyncio.gather(*requests), 5)
    cache.go_on.set()
    await replica.close()
    await asyncio.to_thread(replica._staging._look_ups.shutdown, wait=True)
    assert cache.num_answered == LOOK_UP_THREADS


async def test_a_host_tier_that_hangs_holds_up_no_event_loop_that_asks_for_statistics():
    cache, go_on = FakeCache(), threading.Event()
    replica = await make_replica(FakeEngine(cache=cache))
    answer = cache.stats()
    cache.stats = lambda: answer if go_on.wait(10) else None
    asking = asyncio.create_task(replica.stats())
    await asyncio.sleep(0.01)
    assert not asking.done()
    assert replica.health().state == "ready"
    go_on.set()
    assert (await asking).cache == answer


async def test_who_waits_for_the_engine_keeps_nobody_from_the_tiers(monkeypatch):
    """What was fetched stays in host memory meanwhile; it is leased again when there is a place."""
    monkeypatch.setattr("actors.admission.MAX_FETCHING", 1)
    config = CONFIG.model_copy(update={"engine": EngineConfig(max_batch_size=1)})
    cache = FakeCache(frozenset({0, 1, 2}))
    engine = FakeEngine(cache=cache, receipt=(0, 3 * TOKENS_PER_BLOCK))
    engine.gate.clear()
    replica = await make_replica(engine, config)
    tasks = [asyncio.create_task(collect(replica.generate(request(13)))) for _ in range(8)]
    while len(cache.given_s) < len(tasks):
        await asyncio.sleep(0.001)
    assert len(cache.leased) <= STAGED_BATCHES + 1, "those with a place, and who is fetching"
    while len(cache.leased) > STAGED_BATCHES:  # it goes to stand in the engine's queue
        await asyncio.sleep(0.001)
    engine.gate.set()
    for chunks in await asyncio.gather(*tasks):
        assert chunks[0].receipt.shared == 3 * TOKENS_PER_BLOCK
    assert not cache.leased


async def test_a_client_that_leaves_during_the_look_up_leaves_no_lease():
    cache = SlowHostCache()
    cache.host.num_present = 100
    replica = await make_replica(FakeEngine(cache=cache))
    task = asyncio.create_task(collect(replica.generate(request(13))))
    assert await asyncio.to_thread(cache.entered.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    cache.go_on.set()
    while not cache.num_answered or cache.leased:
        await asyncio.sleep(0.001)
    assert await asyncio.wait_for(collect(replica.generate(request(13))), 5)
    assert not cache.leased


@pytest.mark.parametrize("is_store_usable", [True, False])
async def test_clients_that_leave_while_they_wait_give_their_turn_to_the_others(is_store_usable):
    """Nothing is lost of either queue, whenever a request is aborted."""
    config = CONFIG.model_copy(update={"engine": EngineConfig(max_batch_size=1)})
    cache = FakeCache(stage_s=0.002)
    cache.is_store_usable = is_store_usable
    cache.host.num_present = 1
    replica = await make_replica(FakeEngine(cache=cache, turn_s=0.001), config)
    for delay_s in (0, 0.001, 0.002, 0.004, 0.008, 0.016):
        tasks = [asyncio.create_task(collect(replica.generate(request(13)))) for _ in range(30)]
        await asyncio.sleep(delay_s)
        for task in tasks[::2]:
            task.cancel()
        done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
        assert all(isinstance(result, list) for result in done[1::2])
        while cache.leased:
            await asyncio.sleep(0.001)
    queue = replica._staging
    assert queue._fetching._value == MAX_FETCHING
    assert queue._places._value == STAGED_BATCHES


async def test_the_cache_is_told_whose_blocks_these_are():
    cache, scope = FakeCache(), ReuseScope(cache_salt="tenant")
    replica = await make_replica(FakeEngine(cache=cache))
    await collect(replica.generate(request(13, scope=scope)))
    assert set(cache.scopes) == {scope}


async def test_few_requests_hold_blocks_before_their_first_token_and_all_are_served_in_order(
    monkeypatch,
):
    monkeypatch.setattr("actors.admission.LOOK_UP_THREADS", 1)  # or look-ups end in any order
    config = CONFIG.model_copy(update={"engine": EngineConfig(max_batch_size=2)})
    cache = FakeCache()
    cache.host.num_present = 100
    engine = FakeEngine(cache=cache)
    engine.gate.clear()
    replica = await make_replica(engine, config)
    names = [str(number) for number in range(10)]
    tasks = [
        asyncio.create_task(
            collect(replica.generate(GenerationRequest(name, tuple(range(9)), SamplingParams(3))))
        )
        for name in names
    ]
    await started(engine, 4)
    await asyncio.sleep(0.02)
    assert len(cache.leased) == len(engine.requests) == 4
    assert (await replica.stats()).num_outstanding == 10
    engine.gate.set()
    await asyncio.gather(*tasks)
    assert [one.request_id for one in engine.requests] == names
    assert not cache.leased


async def test_a_full_replica_refuses_until_a_request_ends():
    settings = EngineConfig(max_batch_size=1, max_waiting_requests=1)
    engine = FakeEngine()
    engine.gate.clear()
    replica = await make_replica(engine, CONFIG.model_copy(update={"engine": settings}))
    running = [asyncio.create_task(collect(replica.generate(request()))) for _ in range(2)]
    await started(engine, 2)
    for _ in range(3):
        with pytest.raises(ReplicaBusyError, match="max_waiting_requests"):
            await asyncio.wait_for(collect(replica.generate(request())), 5)
    assert replica.health().state == "ready"
    assert (await replica.stats()).num_outstanding == 2
    engine.gate.set()
    await asyncio.gather(*running)
    assert await collect(replica.generate(request()))


@pytest.mark.parametrize(("asked", "given"), [(None, None), (2, 2), (64, 3)])
async def test_an_engine_gets_no_more_threads_than_its_machine_has_cpus(monkeypatch, asked, given):
    monkeypatch.setattr("actors.replica._num_cpus", lambda: 3)
    seen = []
    config = CONFIG.model_copy(update={"engine": EngineConfig(torch_threads=asked)})
    replica = EngineReplica(config, lambda config: seen.append(config) or FakeEngine())
    await replica.ready()
    assert [one.engine.torch_threads for one in seen] == [given]


async def test_another_process_reaches_it_on_its_socket():
    engine = FakeEngine()
    replica = await make_replica(engine)
    address = await replica.listen("127.0.0.1")
    assert await replica.listen("127.0.0.1") == address
    client = await WireClient.connect("replica-0", address)
    alone = await collect((await make_replica(FakeEngine())).generate(request()))
    assert await collect(client.generate(request())) == alone
    engine.gate.clear()
    task = asyncio.create_task(collect(client.generate(request(max_tokens=30))))
    while not engine.num_running:
        await asyncio.sleep(0.001)
    client.close()
    with pytest.raises(ReplicaUnavailableError):
        await task
    while (await replica.stats()).num_outstanding:
        await asyncio.sleep(0.001)
    assert (engine.num_aborted, engine.num_running) == (1, 0)
    await replica.close()


async def test_requests_of_an_engine_whose_loop_ended_go_on_elsewhere():
    engine = FakeEngine()
    replica = await make_replica(engine)
    engine.fail_with = RuntimeError("out of memory")
    engine.gate.clear()
    task = asyncio.create_task(collect(replica.generate(request())))
    while not engine.requests:
        await asyncio.sleep(0)
    engine.loop_died = True
    engine.gate.set()
    with pytest.raises(ReplicaUnavailableError, match="out of memory"):
        await task
    assert replica.health().state == "failed"
    with pytest.raises(ReplicaUnavailableError, match="failed"):
        await collect(replica.generate(request()))


async def test_health_while_starting_and_after_a_failed_start():
    go_on = threading.Event()

    def build(_):
        assert go_on.wait(10)
        raise ModelError("no such model")

    replica = EngineReplica(CONFIG, build)
    assert replica.health().state == "starting"
    assert (await replica.stats()).engine is None
    with pytest.raises(ReplicaRefusedError, match="starting"):
        await collect(replica.generate(request()))
    go_on.set()
    with pytest.raises(ModelError, match="no such model"):
        await replica.ready()
    assert replica.health().state == "failed"
    assert "no such model" in replica.health().reason
    await replica.close()
    assert replica.health().state == "closed"


async def test_health_sees_a_loop_that_does_not_move():
    now_s, engine = [0.0], FakeEngine()
    replica = await make_replica(engine, stall_timeout_s=5, clock=lambda: now_s[0])
    now_s[0] = 100
    assert replica.health().state == "ready", "an idle engine needs no turns"
    engine.gate.clear()
    task = asyncio.create_task(collect(replica.generate(request())))
    while not engine.requests:
        await asyncio.sleep(0)
    assert replica.health().state == "ready"
    now_s[0] = 104
    assert replica.health().state == "ready"
    now_s[0] = 106
    assert replica.health().state == "stalled"
    engine.gate.set()
    await task
    assert replica.health().state == "ready"


async def test_health_tells_one_process_from_the_next():
    first, second = await make_replica(FakeEngine()), await make_replica(FakeEngine())
    assert first.health().boot_id == first.health().boot_id != second.health().boot_id
    assert first.health().device_tokens == 64 * TOKENS_PER_BLOCK
    assert first.health().machine is None, "it uses no arena"


async def test_drain_refuses_new_requests_waits_and_flushes():
    cache, engine = FakeCache(), None
    engine = FakeEngine(cache=cache)
    replica = await make_replica(engine)
    engine.gate.clear()
    running = asyncio.create_task(collect(replica.generate(request())))
    while not engine.requests:
        await asyncio.sleep(0)
    assert not await replica.drain(0.01)
    with pytest.raises(ReplicaRefusedError, match="draining"):
        await collect(replica.generate(request()))
    assert replica.health().state == "draining"
    assert cache.num_flushes == 1, "what is saved is written although a request goes on"
    assert cache.flush_timeout_s > 0
    engine.gate.set()
    assert await replica.drain(10)
    assert len(await running) == 6
    assert cache.num_flushes == 2
    await replica.close()
    await replica.close()
    assert engine.closed
