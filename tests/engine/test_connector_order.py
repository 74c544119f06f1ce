"""The connector is driven as TensorRT-LLM does: which calls, in which order, with which facts."""

import asyncio
from collections import Counter
from typing import Any

import pytest
import torch

from actors.engine import GenerationRequest, SamplingParams
from actors.engines.torch.pool import PagedPool
from shared_cache.errors import ModelError
from shared_cache.hashing import BlockHash, ReuseScope, block_hashes
from tests.engine.conftest import (
    BLOCK,
    Greedy,
    MakeEngine,
    chunks,
    request,
    some_prompt,
    tokens,
)
from tests.engine.recording import RecordingConnector

NUM_LAYERS = 2


class Pair:
    """Makes the pair when the engine has its pool, and keeps hold of it for the test."""

    def __init__(self, blocks: dict[BlockHash, torch.Tensor] | None = None) -> None:
        self.blocks = {} if blocks is None else blocks
        self.made: RecordingConnector

    def __call__(self, pool: PagedPool) -> tuple[Any, Any]:
        self.made = RecordingConnector(pool, self.blocks)
        return self.made, self.made


async def test_the_calls_for_one_request(make_connected_engine: MakeEngine) -> None:
    pair = Pair()
    engine = make_connected_engine(pair)
    await tokens(engine, request(some_prompt(10), 4, ignore_eos=True))
    layers = ["wait_for_layer_load", "save_kv_layer"] * NUM_LAYERS
    turn = ["build_connector_meta", "bind_connector_meta", "start_load_kv", *layers]
    admission = ["get_num_new_matched_tokens", "update_state_after_alloc"]
    expected = admission + [*turn, "wait_for_save", "get_finished"] * 4
    engine.close()  # the last poll comes after the last chunk
    assert pair.made.names == [*expected[:-1], "request_finished", expected[-1]]
    layer_calls = [f for n, f in pair.made.calls if n == "wait_for_layer_load"]
    assert layer_calls == [0, 1] * 4


async def test_what_is_reported_in_each_turn(make_connected_engine: MakeEngine) -> None:
    pair = Pair()
    engine = make_connected_engine(pair)
    prompt = some_prompt(14)
    output = await tokens(engine, request(prompt, 5, ignore_eos=True))
    assert (
        pair.made.reported()
        == [
            ("new", prompt, 2, 0, 14),
            ("old", output[:1], 0, 14, 1),
            ("old", output[1:2], 0, 15, 1),
            ("old", output[2:3], 1, 16, 1),  # a block border
            ("old", output[3:4], 0, 17, 1),
        ]
    )


async def test_a_chunked_prompt_is_reported_whole_at_first(
    make_connected_engine: MakeEngine,
) -> None:
    pair = Pair()
    engine = make_connected_engine(pair, max_num_tokens=16)
    prompt = some_prompt(40)
    await tokens(engine, request(prompt, 1))
    reports = [
        (len(r.new_tokens), len(r.new_block_ids), r.computed_position, r.num_scheduled_tokens)
        for _, r in pair.made.reports()
    ]
    assert reports == [(40, 5, 0, 16), (0, 0, 16, 16), (0, 0, 32, 8)]


async def test_a_loaded_prefix_is_not_computed(
    make_connected_engine: MakeEngine, plain_greedy: Greedy
) -> None:
    first, second = Pair(), Pair()
    second.blocks = first.blocks
    prompt = some_prompt(45)
    await tokens(make_connected_engine(first), request(prompt, 20, ignore_eos=True))
    assert len(first.blocks) == 8  # 45 + 19 computed tokens: the output's blocks are saved, too
    engine = make_connected_engine(second)
    received = await chunks(engine, request(prompt, 20))
    assert [t for c in received for t in c.token_ids] == plain_greedy(prompt, 20)
    receipt = received[0].receipt
    assert receipt is not None
    assert (receipt.device, receipt.host, receipt.shared, receipt.computed) == (0, 40, 0, 5)
    kind, report = second.made.reports()[0]
    assert (kind, report.computed_position, report.num_scheduled_tokens) == ("new", 0, 5)
    # Loaded blocks are now on the device: the connector is asked for nothing beyond them.
    again = (await chunks(engine, request(prompt, 20)))[0].receipt
    assert again is not None
    assert (again.device, again.host) == (40, 0)
    stats = engine.stats().kv_cache
    assert (stats.reused_blocks, stats.missed_blocks, stats.cache_hit_rate) == (10, 0, 1.0)


@pytest.mark.parametrize("length", [16, 17])
async def test_at_least_one_token_is_left_to_compute(
    length: int, make_connected_engine: MakeEngine, plain_greedy: Greedy
) -> None:
    prompt = some_prompt(length)
    pair = Pair()
    await tokens(make_connected_engine(pair), request(prompt, 9))
    received = await chunks(make_connected_engine(Pair(pair.blocks)), request(prompt, 9))
    assert [t for c in received for t in c.token_ids] == plain_greedy(prompt, 9)
    assert received[0].receipt is not None
    assert received[0].receipt.host == (length - 1) // BLOCK * BLOCK


async def test_salts_keep_tenants_apart(make_connected_engine: MakeEngine) -> None:
    pair = Pair()
    engine = make_connected_engine(pair)
    cached = []
    for salt in ("one", "two", "one"):
        wanted = GenerationRequest(
            salt, tuple(some_prompt(20)), SamplingParams(max_tokens=2), ReuseScope(salt)
        )
        receipt = (await chunks(engine, wanted))[0].receipt
        assert receipt is not None
        cached.append(receipt.cached)
    assert cached == [0, 0, 16]


async def test_unverified_drafts_are_never_called_valid(
    make_connected_engine: MakeEngine, plain_greedy: Greedy
) -> None:
    pair = Pair()
    config = {"decoding_type": "NGram", "max_draft_len": 6, "max_matching_ngram_size": 1}
    engine = make_connected_engine(pair, speculative_config=config)
    prompt = some_prompt(12) * 4
    output = await tokens(engine, request(prompt, 60, ignore_eos=True))
    stats = engine.stats()
    assert stats.proposed_draft_tokens > stats.accepted_draft_tokens
    reports = pair.made.reports()
    assert all(r.num_scheduled_tokens == 1 for kind, r in reports if kind == "old")
    # What was saved is right: another engine computes the same from it.
    follow_up = [*prompt, *output]
    plain = make_connected_engine(Pair(pair.blocks))
    received = await chunks(plain, request(follow_up, 20))
    assert received[0].receipt is not None
    assert received[0].receipt.host >= len(prompt) + 40
    assert [t for c in received for t in c.token_ids] == plain_greedy(follow_up, 20)


async def test_slots_that_are_still_being_saved_are_kept(
    make_connected_engine: MakeEngine,
) -> None:
    pair = Pair()
    engine = make_connected_engine(pair, pool_tokens=32)
    pair.made.holds = True
    await tokens(engine, request(some_prompt(17), 7))
    assert engine.stats().kv_cache.used_num_blocks == 3
    waiting = asyncio.create_task(tokens(engine, request(some_prompt(17, seed=1), 7)))
    # Asked and polled although nothing can run: there may be more to save of what is kept.
    idle_turn = ["build_connector_meta", "bind_connector_meta", "start_load_kv", "get_finished"]
    while pair.made.names[-8:] != idle_turn * 2:
        await asyncio.sleep(0)
    assert not waiting.done()
    asked = [facts[0] for name, facts in pair.made.calls if name == "get_finished"]
    assert [ids for ids in asked if ids] == [[1]]
    pair.made.holds = False
    pair.made.to_let_go = [1]
    assert len(await waiting) <= 7
    assert engine.stats().kv_cache.used_num_blocks == 0


@pytest.mark.parametrize("promise", [(3, False), (24, False), (0, True), (-8, False)])
async def test_a_promise_that_cannot_be_kept_fails_that_request_alone(
    promise: tuple[int, bool],
    make_connected_engine: MakeEngine,
    plain_greedy: Greedy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = Pair()
    engine = make_connected_engine(pair)
    prompt = some_prompt(20)
    with monkeypatch.context() as patch:
        patch.setattr(pair.made, "get_num_new_matched_tokens", lambda *_: promise)
        with pytest.raises(ModelError, match="the connector promised"):
            await tokens(engine, request(prompt))
    assert engine.stats().kv_cache.used_num_blocks == 0
    assert await tokens(engine, request(prompt)) == plain_greedy(prompt, 12)


async def test_blocks_are_hashed_as_everywhere(make_connected_engine: MakeEngine) -> None:
    pair = Pair()
    prompt = some_prompt(24)
    await tokens(make_connected_engine(pair), request(prompt, 1))
    assert set(pair.blocks) == set(block_hashes(prompt, BLOCK))
    assert Counter(pair.made.names)["request_finished"] == 1
