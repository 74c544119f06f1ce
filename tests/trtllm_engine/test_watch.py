"""An engine that no longer answers is found out, also when nobody asks it anything."""

import asyncio
from typing import Any

import pytest

from actors.engines.trtllm.loop import LoopThread
from actors.engines.trtllm.statistics import Statistics
from actors.engines.trtllm.watch import HEALTH_PERIOD_S, EngineWatch
from shared_cache.errors import KvcommonsError, ReplicaUnavailableError
from tests.trtllm_engine.conftest import MakeEngine, chunks, request, some_prompt
from tests.trtllm_engine.llm import FakeLLM


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Probe:
    def __init__(self, error: Exception | None = None, hangs: bool = False) -> None:
        self.error, self.hangs = error, hangs
        self.num_calls = 0

    async def __call__(self) -> None:
        self.num_calls += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error


class NoLlm:
    async def get_stats_async(self, timeout: float) -> Any:
        raise asyncio.QueueEmpty
        yield


async def test_an_idle_engine_is_asked_for_a_token_now_and_then() -> None:
    clock, probe, statistics = Clock(), Probe(), Statistics(8)
    watched = EngineWatch(NoLlm(), statistics, None, probe, clock)
    await watched._check_when_idle()
    clock.now_s += HEALTH_PERIOD_S
    statistics.counts.num_running = 1
    await watched._check_when_idle()
    assert probe.num_calls == 0  # it is busy
    statistics.counts.num_running = 0
    clock.now_s += HEALTH_PERIOD_S
    await watched._check_when_idle()
    await watched._check_when_idle()
    assert probe.num_calls == 1
    assert watched.failure is None


async def test_one_that_fails_or_hangs_has_ended() -> None:
    failing = EngineWatch(NoLlm(), Statistics(8), None, Probe(RuntimeError("no")))
    await failing.check(1.0)
    assert isinstance(failing.failure, RuntimeError)
    hanging = EngineWatch(NoLlm(), Statistics(8), None, Probe(hangs=True))
    await hanging.check(0.01)
    assert isinstance(hanging.failure, TimeoutError)
    await asyncio.wait_for(hanging.run(), 1.0)  # nothing is left to watch


async def test_a_stuck_engine_is_not_alive(
    make_engine: MakeEngine, trtllm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    trtllm.last.is_stuck = True
    with pytest.raises(KvcommonsError, match=r"no token within 0\.05 s"):
        await asyncio.to_thread(engine.check, 0.05)
    assert not engine.is_alive()
    with pytest.raises(ReplicaUnavailableError, match="stuck"):
        await chunks(engine, request(some_prompt(9)))
    trtllm.last.is_stuck = False


async def test_an_executor_that_has_shut_down_is_not_alive(
    make_engine: MakeEngine, trtllm: type[FakeLLM]
) -> None:
    engine = make_engine()
    trtllm.last.shutdown()
    assert not engine.is_alive()
    with pytest.raises(ReplicaUnavailableError, match="shut down"):
        await chunks(engine, request(some_prompt(9)))


async def test_a_health_check_leaves_no_trace(make_engine: MakeEngine) -> None:
    engine = make_engine()
    before = engine.stats()
    await asyncio.to_thread(engine.check)
    after = engine.stats()
    assert (after.generated_tokens, after.prefill_tokens) == (0, 0)
    assert after.kv_cache.missed_blocks == before.kv_cache.missed_blocks == 0


async def test_a_shutdown_that_hangs_is_left_behind(
    make_engine: MakeEngine, trtllm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    from actors.engines.trtllm import engine as engine_module

    engine, release = make_engine(), asyncio.Event()
    loop = asyncio.get_running_loop()
    original = trtllm.last.shutdown

    def hang() -> None:
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result()
        original()

    monkeypatch.setattr(trtllm.last, "shutdown", hang)
    monkeypatch.setattr(engine_module, "SHUTDOWN_TIMEOUT_S", 0.05)
    await asyncio.to_thread(engine.close)
    assert not engine.is_alive()
    release.set()


async def test_a_failing_shutdown_is_borne(
    make_engine: MakeEngine, trtllm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()

    def fail() -> None:
        raise RuntimeError("already gone")

    original = trtllm.last.shutdown
    monkeypatch.setattr(trtllm.last, "shutdown", fail)
    await asyncio.to_thread(engine.close)
    original()
    assert not engine.is_alive()


def test_the_loop_ends_and_takes_nothing_more() -> None:
    loop = LoopThread()
    waiting = loop.post(asyncio.sleep(100))
    assert loop.call(asyncio.sleep(0, "x"), 1.0) == "x"
    with pytest.raises(TimeoutError, match="no answer within"):
        loop.call(asyncio.sleep(100), 0.01)
    loop.stop()
    loop.stop()
    assert waiting.cancelled()
    with pytest.raises(RuntimeError, match="stopped"):
        loop.post(asyncio.sleep(0))
