"""Statistics in every engine's shape, whatever TensorRT-LLM says, leaves out or says wrongly."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from actors.engine import KvCacheStats, Receipt
from actors.engines.trtllm.api import load_api
from actors.engines.trtllm.engine import TrtllmEngine
from actors.engines.trtllm.receipts import make_receipt
from actors.engines.trtllm.service import ServedModel, SharedPart
from actors.engines.trtllm.statistics import Statistics
from shared_cache.connector.match_log import Matched
from shared_cache.namespace import BlockLayout, Namespace
from tests.tiny_model import make_tokenizer
from tests.trtllm_engine import modules
from tests.trtllm_engine.conftest import BLOCK, MakeEngine, chunks, request, some_prompt, until
from tests.trtllm_engine.llm import FakeLLM

KV = {
    "maxNumBlocks": 100,
    "freeNumBlocks": 90,
    "usedNumBlocks": 10,
    "tokensPerBlock": 8,
    "allocTotalBlocks": 30,
    "allocNewBlocks": 20,
    "reusedBlocks": 4,
    "missedBlocks": 12,
    "cacheHitRate": 0.25,
}


def test_the_last_entry_counts() -> None:
    statistics = Statistics(8)
    statistics.take({"iter": 0, "kvCacheStats": {**KV, "reusedBlocks": 1}})
    statistics.take('{"iter": 1, "kvCacheStats": {"reusedBlocks": 4, "missedBlocks": 12}}')
    statistics.take({"iter": 2, "kvCacheStats": KV})
    stats = statistics.snapshot(moves_loaded=False)
    assert stats.kv_cache == KvCacheStats(100, 90, 10, 8, 30, 20, 4, 12)
    assert stats.kv_cache.as_dict() == KV
    assert stats.num_turns == 3


def test_loaded_blocks_are_reused_ones_that_the_engine_counts_as_missed() -> None:
    statistics = Statistics(8)
    statistics.take({"iter": 0, "kvCacheStats": KV})
    statistics.counts.num_waiting = 1
    statistics.started(Receipt(60, 8, 40, 0, 12))
    shared = statistics.snapshot(moves_loaded=True)
    assert (shared.kv_cache.reused_blocks, shared.kv_cache.missed_blocks) == (9, 7)
    assert (shared.prefill_tokens, shared.num_running, shared.num_waiting) == (12, 1, 0)
    plain = statistics.snapshot(moves_loaded=False)
    assert (plain.kv_cache.reused_blocks, plain.kv_cache.missed_blocks) == (4, 12)


def test_more_loaded_blocks_than_missed_ones_are_no_negative_count() -> None:
    statistics = Statistics(8)
    statistics.take({"iter": 0, "kvCacheStats": KV})
    statistics.started(Receipt(8000, 0, 7992, 0, 8))
    kv = statistics.snapshot(moves_loaded=True).kv_cache
    assert (kv.reused_blocks, kv.missed_blocks) == (16, 0)


@pytest.mark.parametrize(
    "entry", [None, "no json", [], {"iter": "x"}, {"kvCacheStats": {"maxNumBlocks": "a"}}, 7]
)
def test_what_is_no_entry_is_counted(entry: Any) -> None:
    statistics = Statistics(8)
    statistics.take({"iter": 3, "kvCacheStats": KV})
    before = statistics.snapshot(moves_loaded=False)
    statistics.take(entry)
    assert statistics.num_malformed == 1
    assert statistics.snapshot(moves_loaded=False) == before


def test_turns_are_seen_without_statistics() -> None:
    """A replica takes an engine whose turns stand still for stuck."""
    statistics = Statistics(8)
    statistics.came(1, 0)
    statistics.came(1, 0)
    assert statistics.snapshot(moves_loaded=False).num_turns == 2
    statistics.take({"iter": 9})
    assert statistics.snapshot(moves_loaded=False).num_turns == 10
    statistics.came(1, 0)
    assert statistics.snapshot(moves_loaded=False).num_turns == 11


def test_drafts_are_added_up() -> None:
    statistics = Statistics(8)
    for _ in range(3):
        statistics.take({"specDecodingStats": {"numDraftTokens": 5, "numAcceptedTokens": 2}})
    statistics.take({"specDecodingStats": None})
    assert statistics.snapshot(moves_loaded=False).proposed_draft_tokens == 15


@pytest.mark.parametrize(
    ("cached", "believed", "expected"),
    [
        (None, 40, Receipt(100, 0, 0, 0, 100)),
        (0, 0, Receipt(100, 0, 0, 0, 100)),
        (48, 16, Receipt(100, 16, 32, 0, 52)),
        (48, 64, Receipt(100, 48, 0, 0, 52)),
        (50, 16, Receipt(100, 18, 32, 0, 50)),
        (100, 0, Receipt(100, 3, 96, 0, 1)),
        (-3, 0, Receipt(100, 0, 0, 0, 100)),
    ],
)
def test_receipts_from_what_upstream_says(
    cached: int | None, believed: int, expected: Receipt
) -> None:
    assert make_receipt(100, cached, believed, 8) == expected


def test_what_the_connector_knows_decides() -> None:
    assert make_receipt(100, 7, 8, 8, Matched(16, 64)) == Receipt(100, 16, 64, 0, 20)


async def test_an_engine_s_figures(make_engine: MakeEngine, trtllm: type[FakeLLM]) -> None:
    engine = make_engine()
    await until(lambda: engine.stats().kv_cache.max_num_blocks == 64)
    prompt = some_prompt(4 * BLOCK + 1)
    await chunks(engine, request(prompt, 5, ignore_eos=True))
    await until(lambda: engine.num_device_blocks(hashes_of(engine, prompt)) == 4)
    (first, *_) = await chunks(engine, request(prompt, 5, ignore_eos=True))
    assert first.receipt == Receipt(33, 32, 0, 0, 1)
    await until(lambda: engine.stats().kv_cache.reused_blocks == 4)
    stats = engine.stats()
    assert stats.kv_cache.missed_blocks == 4
    assert (stats.prefill_tokens, stats.generated_tokens) == (34, 10)
    assert stats.num_running == stats.num_waiting == 0
    trtllm.last._entries.append("no entry")
    await until(lambda: engine._service.statistics.num_malformed == 1)
    assert replace(engine.stats(), num_turns=0) == replace(stats, num_turns=0)


@pytest.mark.parametrize("empty_with", [IndexError, asyncio.TimeoutError])
async def test_empty_queues_show_in_several_ways(
    make_engine: MakeEngine, trtllm: type[FakeLLM], empty_with: type[Exception]
) -> None:
    trtllm.empty_with = empty_with
    engine = make_engine()
    await until(lambda: engine.stats().kv_cache.max_num_blocks == 64)
    assert engine._watch._faults.num_faults == 0


async def test_an_engine_without_statistics_serves(
    make_engine: MakeEngine, trtllm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(timeout: float) -> None:
        raise NotImplementedError("get_stats is not implemented")

    monkeypatch.setattr(trtllm, "get_stats_async", lambda self, timeout: refuse(timeout))
    monkeypatch.setattr(trtllm, "get_kv_cache_events_async", lambda self, timeout: refuse(timeout))
    engine = make_engine()
    assert await chunks(engine, request(some_prompt(9)))
    assert engine.stats().num_turns > 0
    assert engine.max_total_tokens == 1024
    assert engine.num_device_blocks(hashes_of(engine, some_prompt(32))) == 0


def hashes_of(engine: Any, prompt: list[int]) -> Any:
    from shared_cache.hashing import block_hashes

    return block_hashes(prompt[:-1], engine.namespace.layout.tokens_per_block)


async def test_what_computing_costs_is_learned_from_lone_requests(trtllm: type[FakeLLM]) -> None:
    """Else the cost gate could never tell when a slow store is not worth waiting for."""
    seen: list[tuple[Any, float]] = []
    part = SharedPart(
        Namespace("m", "r", "t", BlockLayout(1, 2, 1, BLOCK, 2, "float16")),
        None,
        lambda: None,
        saw_prefill=lambda spans, seconds: seen.append((list(spans), seconds)),
    )
    served = ServedModel(make_tokenizer(), frozenset({2}), 259, 2048)
    kv = modules.KvCacheConfig(max_tokens=4096, tokens_per_block=BLOCK)
    llm = FakeLLM("m", kv_cache_config=kv, enable_chunked_prefill=True, max_num_tokens=64)
    engine = TrtllmEngine(llm, load_api(), served, part, "plain")
    try:
        await chunks(engine, request(some_prompt(300), 2))
        await chunks(engine, request(some_prompt(100, seed=3), 2))  # too short to tell
        assert [spans for spans, _ in seen] == [[(0, 300)]]
        assert seen[0][1] > 0
        trtllm.turn_s = 0.01
        together = [chunks(engine, request(some_prompt(400, seed), 9)) for seed in (5, 6)]
        await asyncio.gather(*together)
        assert len(seen) == 1
    finally:
        await asyncio.to_thread(engine.close)
