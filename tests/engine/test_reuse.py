"""Blocks on the device, in host memory and in the store: fewer tokens computed, the same output."""

import asyncio
from pathlib import Path

from actors.engine import Receipt
from actors.engines.torch.engine import TorchEngine
from shared_cache.config import CacheConfig
from shared_cache.hashing import block_hashes
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


async def receipt_of(engine: TorchEngine, prompt: list[int], num_tokens: int = 3) -> Receipt:
    received = await chunks(engine, request(prompt, num_tokens))
    receipt = received[0].receipt
    assert receipt is not None
    assert receipt.prompt_tokens == receipt.cached + receipt.computed == len(prompt)
    return receipt


async def test_blocks_on_the_device_are_used_again(
    make_engine: MakeEngine, plain_greedy: Greedy
) -> None:
    engine = make_engine()
    shared = some_prompt(32)
    for number, reused in enumerate((0, 32, 32)):
        prompt = shared + some_prompt(9, seed=number)
        assert await tokens(engine, request(prompt)) == plain_greedy(prompt, 12)
        assert engine.stats().kv_cache.reused_blocks == number * 4
        assert engine.stats().prefill_tokens == 41 + number * (41 - reused)


async def test_the_next_turn_of_a_conversation_reuses_the_answer(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = some_prompt(20)
    output = await tokens(engine, request(prompt, 30, ignore_eos=True))
    receipt = await receipt_of(engine, [*prompt, *output, 5, 6])
    assert receipt.device == (len(prompt) + len(output) - 1) // BLOCK * BLOCK


async def test_what_is_on_the_device_is_told(make_engine: MakeEngine) -> None:
    engine = make_engine()
    hashes = block_hashes(some_prompt(40), BLOCK)
    assert engine.num_device_blocks(hashes) == 0
    await tokens(engine, request(some_prompt(32), 1))
    assert engine.num_device_blocks(hashes) == 4


async def test_without_block_reuse_everything_is_computed(make_engine: MakeEngine) -> None:
    engine = make_engine(reuse=False)
    prompt = some_prompt(32)
    for _ in range(2):
        assert (await receipt_of(engine, prompt)).computed == 32
    assert engine.stats().kv_cache.cache_hit_rate == 0


async def test_equal_prompts_at_the_same_time_are_computed_once(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_tokens=16)
    prompt = some_prompt(48)
    receipts = await asyncio.gather(*[receipt_of(engine, prompt) for _ in range(4)])
    assert [r.computed for r in receipts] == [48, 8, 8, 8]


async def test_a_full_pool_makes_requests_wait_not_fail(
    make_engine: MakeEngine, plain_greedy: Greedy
) -> None:
    engine = make_engine(pool_tokens=64)
    prompts = [some_prompt(30, seed) for seed in range(6)]
    outputs = await asyncio.gather(*[tokens(engine, request(p, 20)) for p in prompts])
    assert outputs == [plain_greedy(p, 20) for p in prompts]
    stats = engine.stats()
    assert stats.kv_cache.used_num_blocks == 0
    assert stats.num_running == stats.num_waiting == 0


async def test_evicted_blocks_come_back_from_host_memory(make_engine: MakeEngine) -> None:
    a, b = some_prompt(56, 1), some_prompt(56, 2)
    reused = {}
    for size in (None, 1 << 20):
        engine = make_engine(pool_tokens=64, host_bytes=size)
        outputs = [await tokens(engine, request(prompt, 8)) for prompt in (a, b, a, b)]
        assert outputs[:2] == outputs[2:]
        reused[size] = engine.stats().kv_cache.reused_blocks
    assert reused[None] == 0
    assert reused[1 << 20] == 12


async def test_another_engine_loads_what_one_has_saved(
    make_engine: MakeEngine, plain_greedy: Greedy, tmp_path: Path
) -> None:
    cache = CacheConfig(store=f"file://{tmp_path}", host=HOST, staging_deadline_s=20)
    prompt = some_prompt(45)
    first = make_engine(cache=cache)
    output = await tokens(first, request(prompt, 20))
    first.close()
    second = make_engine(cache=cache)
    assert second.namespace == first.namespace
    assert second.cache is not None
    staged = await asyncio.to_thread(second.cache.stage, block_hashes(prompt, BLOCK))
    try:
        receipt = await receipt_of(second, prompt, 20)
    finally:
        second.cache.release(staged)
    assert (receipt.host, receipt.computed) == (40, 5)
    assert await tokens(second, request(prompt, 20)) == output == plain_greedy(prompt, 20)


async def test_statistics_have_tensorrt_llms_names(make_engine: MakeEngine) -> None:
    engine = make_engine(pool_tokens=512)
    prompt = some_prompt(32)
    for _ in range(2):
        await tokens(engine, request(prompt, 2, ignore_eos=True))
    stats = engine.stats()
    assert stats.kv_cache.as_dict() == {
        "maxNumBlocks": 64,
        "freeNumBlocks": 64,
        "usedNumBlocks": 0,
        "tokensPerBlock": BLOCK,
        "allocTotalBlocks": 10,
        "allocNewBlocks": 7,
        "reusedBlocks": 3,
        "missedBlocks": 5,
        "cacheHitRate": 3 / 8,
    }
    assert (stats.num_turns, stats.generated_tokens, stats.prefill_tokens) == (4, 4, 40)
