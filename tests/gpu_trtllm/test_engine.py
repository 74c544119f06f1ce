"""The engine on a real TensorRT-LLM: modes, streams, figures, memory that is free afterwards."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.config import NGramConfig, ReplicaConfig
from actors.engine import GenerationRequest, SamplingParams, TokenChunk
from actors.engines import build_engine
from actors.engines.trtllm.engine import TrtllmEngine
from actors.engines.trtllm.gpu_memory import visible_gpus
from actors.engines.trtllm.trial import common_part, judge, run_trial, trial_prompt
from shared_cache.errors import RequestError
from shared_cache.hashing import block_hashes

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

WAIT_S = 30.0


@asynccontextmanager
async def running(config: ReplicaConfig) -> AsyncIterator[TrtllmEngine]:
    engine = await asyncio.to_thread(build_engine, config)
    assert isinstance(engine, TrtllmEngine)
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.close)


def changed(config: ReplicaConfig, **engine: Any) -> ReplicaConfig:
    return config.model_copy(update={"engine": config.engine.model_copy(update=engine)})


def request(num_tokens: int, num_output: int = 32, **settings: Any) -> GenerationRequest:
    sampling = SamplingParams(num_output, ignore_eos=True, **settings)
    return GenerationRequest("r", trial_prompt(num_tokens), sampling)


async def ask(engine: TrtllmEngine, wanted: GenerationRequest) -> list[TokenChunk]:
    return [chunk async for chunk in engine.generate(wanted)]


def tokens(chunks: list[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


async def until(is_so: Any) -> None:
    async def wait() -> None:
        while not is_so():
            await asyncio.sleep(0.05)

    await asyncio.wait_for(wait(), WAIT_S)


async def test_two_engines_share_a_cache(config: ReplicaConfig, tmp_path: Path) -> None:
    trial = await run_trial(config, tmp_path / "store")
    findings = judge(trial, config.engine.kv_cache_config.tokens_per_block)
    for one in findings:
        print(f"{one.state}: {one.name}: {one.text}")
    assert [one for one in findings if one.state == "fail"] == []


async def test_two_ranks_share_a_cache(config: ReplicaConfig, tmp_path: Path) -> None:
    if len(visible_gpus()) < 2:
        pytest.skip("needs two GPUs")
    trial = await run_trial(changed(config, tensor_parallel_size=2), tmp_path / "store")
    findings = judge(trial, config.engine.kv_cache_config.tokens_per_block)
    assert [one for one in findings if one.state == "fail"] == []


async def test_a_plain_engine_and_its_figures(config: ReplicaConfig) -> None:
    async with running(config) as engine:
        wanted = request(10 * 32 + 1)
        cold = await ask(engine, wanted)
        assert len(tokens(cold)) == 32
        assert cold[-1].finish_reason == "length"
        hashes = block_hashes(wanted.prompt_token_ids[:-1], 32)
        await until(lambda: engine.num_device_blocks(hashes) == 10)
        (first, *_) = again = await ask(engine, wanted)
        assert first.receipt is not None
        assert first.receipt.device == 320
        assert common_part(tokens(cold), tokens(again)) >= 0.75
        await until(lambda: engine.stats().kv_cache.reused_blocks >= 10)
        print(engine.stats(), engine.take_cache_changes())
        assert engine._service.events.num_malformed == 0
        assert engine._service.statistics.num_malformed == 0


async def test_an_abort_is_heeded(config: ReplicaConfig) -> None:
    async with running(config) as engine:
        async with aclosing(engine.generate(request(64, 2000))) as stream:
            await anext(stream)
        await until(lambda: engine.stats().num_running == 0)
        assert tokens(await ask(engine, request(64)))


async def test_a_stream_goes_on_where_it_stopped(config: ReplicaConfig) -> None:
    async with running(config) as engine:
        whole = tokens(await ask(engine, request(64)))
        rest = tokens(await ask(engine, request(64).continued(tuple(whole[:10]))))
        assert len(rest) == 22
        assert common_part(whole[10:], rest) >= 0.75


async def test_what_is_too_long_is_refused_and_the_engine_lives(config: ReplicaConfig) -> None:
    async with running(config) as engine:
        with pytest.raises(RequestError):
            await ask(engine, request(engine.max_total_tokens))
        await asyncio.to_thread(engine.check)


async def test_stop_tokens_and_temperatures(config: ReplicaConfig) -> None:
    async with running(config) as engine:
        whole = tokens(await ask(engine, request(64)))
        stopped = await ask(engine, request(64, stop_token_ids=(whole[5],)))
        assert stopped[-1].finish_reason == "stop"
        assert tokens(stopped)[-1] == whole[5]
        hot = replace(request(64).sampling, temperature=1.0, seed=7)
        assert len(tokens(await ask(engine, replace(request(64), sampling=hot)))) == 32


async def test_offload(config: ReplicaConfig) -> None:
    kv = config.engine.kv_cache_config.model_copy(
        update={"host_cache_size": 1 << 30, "max_tokens": 512}
    )
    async with running(changed(config, kv_cache_config=kv)) as engine:
        one, other = request(12 * 32 + 1, 4), request(13 * 32 + 1, 4)
        other = replace(other, prompt_token_ids=other.prompt_token_ids[::-1])
        for wanted in (one, other):
            await ask(engine, wanted)
        (first, *_) = await ask(engine, one)
        assert first.receipt is not None
        assert first.receipt.cached > 0


async def test_ngram(config: ReplicaConfig) -> None:
    async with running(changed(config, speculative_config=NGramConfig())) as engine:
        repeated = replace(request(1), prompt_token_ids=trial_prompt(24) * 8)
        assert len(tokens(await ask(engine, repeated))) == 32
        print(engine.stats())
