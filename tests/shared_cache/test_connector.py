"""Scheduler and worker under an engine whose KV gives away every wrong block."""

import logging
import random
from collections.abc import Callable, Sequence

import pytest
import torch

from shared_cache.connector.identity import reuse_scope
from shared_cache.connector.interface import RequestData, SchedulerOutput
from shared_cache.connector.scheduler import SharedCacheScheduler
from shared_cache.connector.transfers import TransferPlan
from shared_cache.connector.worker import SharedCacheWorker
from shared_cache.errors import ConfigError
from shared_cache.hashing import BlockHashChain, ReuseScope, block_hashes
from shared_cache.host.interface import HostLease, NewRun
from shared_cache.staging import SharedCache
from tests.shared_cache.fakes import (
    BLOCK_BYTES,
    LAYOUT,
    WAIT_S,
    ScriptedStore,
    await_published,
    make_cache,
    num_in_host,
)
from tests.shared_cache.mini_engine import SIZE, MiniEngine, MiniRequest, block_kv

PROMPT = list(range(1, 30))


def check_store(store: ScriptedStore, tokens: list[int], scope: ReuseScope | None = None) -> int:
    """Leading full blocks of `tokens` that are stored, each compared with what it must hold."""
    hashes = block_hashes(tokens, SIZE, scope or ReuseScope())
    num_blocks = store.match(hashes)
    buffers = [memoryview(bytearray(BLOCK_BYTES)) for _ in range(num_blocks)]
    assert len(store.read_into(hashes[:num_blocks], buffers)) == num_blocks
    for index, buffer in enumerate(buffers):
        assert bytes(buffer) == block_kv(tokens, index)
    return num_blocks


def check_quiet(cache: SharedCache, *engines: MiniEngine) -> None:
    """Nothing is leased, reserved, tracked or failed once all work is done."""
    assert cache.flush(WAIT_S)
    for engine in engines:
        for _ in range(2):
            engine.turn()
        assert engine.scheduler.num_tracked_requests == 0
        assert (engine.scheduler.connector_faults, engine.worker.connector_faults) == (0, 0)
    stats = cache.stats()
    assert (stats.host.leased_slots, stats.host.reserved_slots) == (0, 0)
    assert (stats.store_faults, stats.dropped_saves) == (0, 0)


@pytest.mark.parametrize("chunk", [1000, 8, 5, 1])
def test_a_second_replica_loads_what_the_first_computed(chunk: int) -> None:
    store = ScriptedStore()
    first_cache, second_cache = make_cache(store), make_cache(store)
    first, second = MiniEngine(first_cache, chunk=chunk), MiniEngine(second_cache, chunk=chunk)
    answer = MiniRequest(1, list(PROMPT))
    assert first.run(answer, num_new_tokens=9) == 0
    check_quiet(first_cache, first)
    assert check_store(store, answer.tokens) == (len(answer.tokens) - 1) // SIZE

    again = MiniRequest(1, list(PROMPT))
    staged = second_cache.stage(block_hashes(PROMPT, SIZE))
    assert second.run(again, num_new_tokens=9) == 28
    second_cache.release(staged)
    assert again.tokens == answer.tokens
    check_quiet(second_cache, second)
    assert second_cache.stats().saved_blocks == 0  # the store had all of them
    for cache in (first_cache, second_cache):
        cache.close()


def test_a_follow_up_turn_loads_generated_blocks_too() -> None:
    cache = make_cache(None)
    engine = MiniEngine(cache)
    request = MiniRequest(1, list(PROMPT))
    engine.run(request, num_new_tokens=12)
    follow_up = MiniRequest(2, [*request.tokens, 5, 6, 7])
    assert engine.run(follow_up) == 40
    check_quiet(cache, engine)
    cache.close()


@pytest.mark.parametrize(("device_tokens", "loaded"), [(0, 28), (8, 20), (28, 0), (6, 0), (27, 0)])
def test_what_the_device_has_is_not_loaded(device_tokens: int, loaded: int) -> None:
    store = ScriptedStore()
    cache = make_cache(store)
    engine = MiniEngine(cache)
    engine.run(MiniRequest(1, list(PROMPT)))
    assert engine.run(MiniRequest(2, list(PROMPT)), device_tokens=device_tokens) == loaded
    check_quiet(cache, engine)
    assert check_store(store, PROMPT) == 7
    cache.close()


def test_a_full_prompt_hit_leaves_its_last_block_to_compute() -> None:
    cache = make_cache(None)
    engine = MiniEngine(cache)
    engine.run(MiniRequest(1, PROMPT[:16]))
    assert engine.run(MiniRequest(2, PROMPT[:16])) == 12
    check_quiet(cache, engine)
    cache.close()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"cache_salt": "a"}, {"cache_salt": "b"}),
        ({"cache_salt": "a"}, {}),
        ({"lora_task_id": 1}, {"lora_task_id": 2}),
        ({"lora_task_id": 0}, {}),
    ],
)
def test_scopes_share_nothing(one: dict[str, object], other: dict[str, object]) -> None:
    cache = make_cache(None)
    engine = MiniEngine(cache)
    engine.run(MiniRequest(1, list(PROMPT), **one))  # type: ignore[arg-type]
    assert engine.run(MiniRequest(2, list(PROMPT), **other)) == 0  # type: ignore[arg-type]
    assert engine.run(MiniRequest(3, list(PROMPT), **one)) == 28  # type: ignore[arg-type]
    cache.close()


def test_scope_reads_whichever_attribute_the_engine_has() -> None:
    class OldRequest:
        request_id = 1
        cache_salt_id: int | None = 77
        lora_task_id: int | None = 3

        def get_tokens(self, beam: int) -> list[int]:
            return []

    request = OldRequest()
    assert reuse_scope(request) == ReuseScope("cache_salt_id:77", "3")
    request.cache_salt_id = request.lora_task_id = None
    assert reuse_scope(request) == ReuseScope()
    assert reuse_scope(MiniRequest(1, [], cache_salt="s")) == ReuseScope("s")


def test_multimodal_requests_match_nothing_and_are_not_saved() -> None:
    cache = make_cache(None)
    engine = MiniEngine(cache)
    engine.run(MiniRequest(1, list(PROMPT), multimodal_hashes=[1]))
    assert cache.stats().host.used_slots == 0
    engine.run(MiniRequest(2, list(PROMPT)))
    assert engine.run(MiniRequest(3, list(PROMPT), multimodal_hashes=[1])) == 0
    check_quiet(cache, engine)
    cache.close()


def test_a_multimodal_request_with_the_id_of_a_vanished_one_is_not_taken_for_it() -> None:
    cache = make_cache(None)
    engine = MiniEngine(cache)
    engine.start(MiniRequest(1, list(PROMPT)))
    engine.run(MiniRequest(1, list(PROMPT), multimodal_hashes=[1]))
    assert cache.stats().host.used_slots == 0
    check_quiet(cache, engine)
    cache.close()


def test_an_aborted_request_leaves_no_lease_even_without_a_finish() -> None:
    cache = make_cache(None)
    engine = MiniEngine(cache)
    engine.run(MiniRequest(1, list(PROMPT)))
    aborted = MiniRequest(2, list(PROMPT))
    engine.start(aborted)
    engine.turn(new=(aborted,))
    engine.abort(aborted)
    assert cache.stats().host.leased_slots == 7
    for _ in range(2):
        engine.turn()
    assert cache.stats().host.leased_slots == 0
    assert engine.run(MiniRequest(2, list(PROMPT))) == 28
    check_quiet(cache, engine)
    cache.close()


def test_a_leased_block_is_loaded_though_everything_else_was_evicted() -> None:
    """Between match and load others fill the host tier; the promise holds."""
    cache = make_cache(None, num_slots=10)
    engine = MiniEngine(cache)
    engine.run(MiniRequest(1, list(PROMPT)))
    promised = MiniRequest(2, list(PROMPT))
    engine.start(promised)
    assert promised.num_loaded_tokens == 28
    slots = cache.reserve(10)
    assert len(slots) == 3
    for slot in slots:
        cache.host.buffer(slot)[:] = b"\xaa" * BLOCK_BYTES
    engine.turn(new=(promised,))
    cache.give_back(slots)
    engine.finish(promised)
    cache.close()


def test_saves_that_find_no_slot_are_dropped_from_the_end_and_counted() -> None:
    cache = make_cache(None, num_slots=10)
    engine = MiniEngine(cache)
    held = cache.host.reserve(6)
    engine.run(MiniRequest(1, list(PROMPT)))
    assert cache.stats().dropped_saves == 3
    assert num_in_host(cache, block_hashes(PROMPT, SIZE)) == 4
    cache.host.cancel(held)
    assert engine.run(MiniRequest(2, list(PROMPT))) == 16
    assert num_in_host(cache, block_hashes(PROMPT, SIZE)) == 7
    cache.close()


def test_copies_off_the_device_that_fail_give_their_slots_back_and_are_counted() -> None:
    cache = make_cache(None, num_slots=20)
    engine = MiniEngine(cache)
    good, calls = engine.worker._copier, []

    class Broken:
        """A device that fails when blocks are copied off it."""

        def load(self, copies: object, stream: object) -> None:
            assert not copies

        def before_writes(self, blocks: object, stream: object) -> None:
            assert blocks is None

        def save(
            self, copies: object, stream: object, on_done: object, on_failed: Callable[..., None]
        ) -> None:
            calls.append(copies)
            on_failed(RuntimeError("the device is gone"))

    engine.worker._copier = Broken()  # type: ignore[assignment]
    engine.run(MiniRequest(1, list(PROMPT)))
    assert len(calls) == 1
    assert (cache.stats().dropped_saves, cache.stats().host.reserved_slots) == (7, 0)
    assert engine.worker.connector_faults == 1
    engine.worker._copier = good
    assert engine.run(MiniRequest(2, list(PROMPT))) == 0
    assert engine.run(MiniRequest(3, list(PROMPT))) == 28, "the next one is saved"
    cache.close()


def test_many_mixed_requests_never_attend_to_a_wrong_block() -> None:
    """Shared prefixes, chunks, aborts, a host tier that evicts, two engines on one store."""
    draw = random.Random(7)
    store = ScriptedStore()
    caches = [make_cache(store, num_slots=24) for _ in range(2)]
    engines = [MiniEngine(cache, num_blocks=80, chunk=7) for cache in caches]
    num_loaded = 0
    for round_ in range(25):
        for cache, engine in zip(caches, engines, strict=True):
            running = []
            for index in range(3):
                tokens = PROMPT[: draw.randrange(1, 29)] + [draw.randrange(3)] * draw.randrange(9)
                request = MiniRequest(round_ * 10 + index, tokens)
                staged = cache.stage(block_hashes(tokens, SIZE))
                engine.start(request, device_tokens=draw.choice([0, 0, 0, len(tokens) // 2]))
                engine.turn(*running, new=(request,))
                cache.release(staged)
                running.append(request)
                num_loaded += request.num_loaded_tokens
            for _ in range(draw.randrange(12)):
                engine.turn(*running)
            for request in running:
                draw.choice([engine.finish, engine.finish, engine.abort])(request)
                check_store(store, request.tokens)
    assert num_loaded > 500
    assert sum(cache.stats().fetched_blocks for cache in caches) > 0
    assert all(engine.scheduler.connector_faults == 0 for engine in engines)
    assert all(engine.worker.connector_faults == 0 for engine in engines)
    for cache in caches:
        cache.close()


def test_each_match_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    cache = make_cache(None)
    engine = MiniEngine(cache)
    with caplog.at_level(logging.INFO):
        engine.run(MiniRequest(1, list(PROMPT)))
        engine.run(MiniRequest(2, list(PROMPT)))
    assert caplog.messages == [
        "KV CONNECTOR: matched 0 blocks for request 1",
        "KV CONNECTOR: matched 7 blocks for request 2",
    ]
    cache.close()


# Faults behind the hooks


def test_an_error_in_match_is_a_miss_is_counted_and_leaves_no_lease(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = make_cache(None)
    scheduler = SharedCacheScheduler(cache, SIZE)
    for _ in range(2):
        assert scheduler.get_num_new_matched_tokens(MiniRequest(1, [-5] * 9), 0) == (0, False)
    assert scheduler.connector_faults == 2
    assert len(caplog.records) == 1
    assert "OverflowError" in caplog.text
    assert scheduler.num_tracked_requests == 0
    cache.close()


def test_an_error_while_planning_saves_saves_nothing() -> None:
    cache = make_cache(None)
    scheduler = SharedCacheScheduler(cache, SIZE)
    scheduler.get_num_new_matched_tokens(MiniRequest(1, list(PROMPT)), 0)
    report = RequestData(1, [*PROMPT, -1], list(range(8)), 0, len(PROMPT))
    assert scheduler.build_connector_meta(SchedulerOutput([report])) == TransferPlan()
    assert scheduler.connector_faults == 1
    cache.close()


def test_a_promise_that_cannot_be_kept_stops_the_engine() -> None:
    cache = make_cache(None)
    engine = MiniEngine(cache)
    engine.run(MiniRequest(1, list(PROMPT)))
    engine.scheduler.get_num_new_matched_tokens(MiniRequest(2, list(PROMPT)), 0)
    report = RequestData(2, list(PROMPT), [1, 2], 0, 1)
    plan = engine.scheduler.build_connector_meta(SchedulerOutput([report]))
    engine.worker.bind_connector_meta(plan)
    with pytest.raises(RuntimeError, match="7 blocks of prefix are promised, the engine alloc"):
        engine.worker.start_load_kv(None)
    assert engine.scheduler.connector_faults == 1
    cache.close()


def test_an_error_while_saving_is_counted_and_gives_the_slots_back() -> None:
    cache = make_cache(None)
    engine = MiniEngine(cache, num_blocks=8)
    chain = BlockHashChain(SIZE, tokens=PROMPT)
    scheduler = engine.scheduler
    scheduler.get_num_new_matched_tokens(MiniRequest(1, list(PROMPT)), 0)
    report = RequestData(1, list(PROMPT), [0, 1, 99], 0, len(PROMPT))
    engine.worker.bind_connector_meta(scheduler.build_connector_meta(SchedulerOutput([report])))
    engine.worker.start_load_kv(None)
    engine.worker.wait_for_save(None)
    assert engine.worker.connector_faults == 1
    assert cache.stats().host.reserved_slots == 0
    assert num_in_host(cache, chain.hashes) == 0
    cache.close()


def bind_three_saves(engine: MiniEngine) -> list[BlockHashChain]:
    """Give the worker a plan with three runs of two blocks; what the runs hold."""
    prompts = [list(range(start, start + 2 * SIZE)) for start in (0, 100, 200)]
    for index, prompt in enumerate(prompts):
        engine.scheduler.get_num_new_matched_tokens(MiniRequest(index, prompt), 0)
    reports = [
        RequestData(index, prompt, [2 * index, 2 * index + 1], 0, len(prompt))
        for index, prompt in enumerate(prompts)
    ]
    plan = engine.scheduler.build_connector_meta(SchedulerOutput(reports))
    assert len(plan.saves) == 3
    engine.worker.bind_connector_meta(plan)
    return [BlockHashChain(SIZE, tokens=prompt) for prompt in prompts]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_run_that_cannot_be_published_costs_the_others_nothing(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(None)
    engine = MiniEngine(cache, num_blocks=8)
    chains = bind_three_saves(engine)
    commit = cache.host.commit

    def fail_once(slots: Sequence[int], run: NewRun) -> HostLease:
        if run.hashes[0] == chains[failing].hashes[0]:
            raise ConnectionError("the host tier's server is gone")
        return commit(slots, run)

    monkeypatch.setattr(cache.host, "commit", fail_once)
    engine.worker.wait_for_save(None)
    await_published(cache)
    assert engine.worker.connector_faults == 0
    found = [num_in_host(cache, chain.hashes) for chain in chains]
    assert found == [0 if i == failing else 2 for i in range(3)]
    stats = cache.stats()
    assert (stats.store_faults, stats.dropped_saves) == (1, 2)
    assert (stats.host.reserved_slots, stats.host.leased_slots, stats.host.used_slots) == (0, 0, 4)
    cache.close()


def test_an_interrupt_between_two_runs_gives_back_only_what_is_not_published(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = make_cache(None)
    engine = MiniEngine(cache, num_blocks=8)
    chains = bind_three_saves(engine)
    save = cache.save

    def interrupted(slots: Sequence[int], run: NewRun, first: int) -> None:
        if run.hashes[0] == chains[1].hashes[0]:
            raise KeyboardInterrupt
        save(slots, run, first)

    monkeypatch.setattr(cache, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.worker.wait_for_save(None)
    await_published(cache)
    assert [num_in_host(cache, chain.hashes) for chain in chains] == [2, 0, 0]
    assert (cache.stats().host.reserved_slots, cache.stats().host.leased_slots) == (0, 0)
    cache.close()


def test_a_plan_is_carried_out_once_and_a_warm_up_without_one_does_nothing() -> None:
    store = ScriptedStore()
    cache = make_cache(store)
    engine = MiniEngine(cache)
    engine.run(MiniRequest(1, list(PROMPT)))
    assert cache.flush(WAIT_S)  # or both runs might be written as one
    request = MiniRequest(2, [*PROMPT, *range(8)])
    engine.start(request)
    engine.turn(new=(request,))
    assert cache.flush(WAIT_S)
    assert store.num_writes == 2
    engine.rows[0][:] = 0
    for bind in (lambda _: None, engine.worker.bind_connector_meta):
        bind("warm-up")
        engine.worker.start_load_kv(None)
        engine.worker.wait_for_layer_load(0, None)
        engine.worker.save_kv_layer(0, None)
        engine.worker.wait_for_save(None)
    assert cache.flush(WAIT_S)
    assert store.num_writes == 2
    assert not engine.rows[0].any()
    cache.close()


# Registration


def test_a_pool_with_blocks_of_another_size_is_refused() -> None:
    worker = SharedCacheWorker(make_cache(None))
    with pytest.raises(ConfigError, match=r"has 128 bytes.*namespace 64; set tokens_per_block"):
        worker.register_kv_caches(torch.zeros((4, 32)))


def test_a_pool_that_is_not_contiguous_is_refused() -> None:
    worker = SharedCacheWorker(make_cache(None))
    with pytest.raises(ConfigError, match="must be contiguous with blocks first"):
        worker.register_kv_caches(torch.zeros((16, 4)).t())
    with pytest.raises(ConfigError, match="must be contiguous with blocks first"):
        worker.register_kv_caches(torch.zeros(16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_a_pool_of_any_dtype_moves_as_bytes(dtype: torch.dtype) -> None:
    cache = make_cache(None)
    pool = torch.zeros((3, BLOCK_BYTES // dtype.itemsize), dtype=dtype)
    worker = SharedCacheWorker(cache)
    worker.register_kv_caches(pool)
    pool.view(torch.uint8)[1] = torch.arange(BLOCK_BYTES, dtype=torch.uint8)
    scheduler = SharedCacheScheduler(cache, LAYOUT.tokens_per_block)
    tokens = PROMPT[: 2 * SIZE]
    for id_, blocks, scheduled in ((1, [1, 0], SIZE), (2, [2, 0], 1)):
        scheduler.get_num_new_matched_tokens(MiniRequest(id_, tokens), 0)
        report = RequestData(id_, tokens, blocks, 0, scheduled)
        worker.bind_connector_meta(scheduler.build_connector_meta(SchedulerOutput([report])))
        worker.start_load_kv(None)
        worker.wait_for_save(None)
        await_published(cache)
    assert torch.equal(pool.view(torch.uint8)[2], torch.arange(BLOCK_BYTES, dtype=torch.uint8))
    worker.close()
    cache.close()
