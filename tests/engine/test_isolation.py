"""One request's trouble stays its own, and no slot is cleared while its last block is in use."""

import asyncio
from typing import Any

import pytest

from actors.engines.torch.request import ActiveRequest
from actors.engines.torch.scheduler import Limits, Scheduler
from actors.engines.torch.slots import SlotPool
from shared_cache.errors import ModelError
from tests.engine.conftest import Greedy, MakeEngine, request, some_prompt, tokens
from tests.engine.test_scheduler import BLOCK, sequence

LOOPS = ("plain", "overlapped")


async def test_an_error_in_one_requests_text_ends_that_request_alone(
    make_engine: MakeEngine, plain_greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    take = ActiveRequest.take
    bad, good = some_prompt(20), some_prompt(9, 1)

    def poisoned(active: ActiveRequest, tokens: list[int], num_accepted: int) -> Any:
        if active.request.prompt_token_ids == tuple(bad):
            raise UnicodeError("half a character")
        return take(active, tokens, num_accepted)

    monkeypatch.setattr(ActiveRequest, "take", poisoned)
    results = await asyncio.gather(
        tokens(engine, request(bad)), tokens(engine, request(good)), return_exceptions=True
    )
    assert isinstance(results[0], ModelError)
    assert "half a character" in str(results[0])
    assert results[1] == plain_greedy(good, 12)
    assert engine.is_alive()
    assert engine.stats().kv_cache.used_num_blocks == 0


async def test_a_vanishing_temperature_is_greedy(
    make_engine: MakeEngine, plain_greedy: Greedy
) -> None:
    engine = make_engine()
    prompt = some_prompt(20)
    for temperature in (1e-50, 1e-6):
        drawn = await tokens(engine, request(prompt, temperature=temperature, seed=1))
        assert drawn == plain_greedy(prompt, 12)


def test_slots_that_are_loaded_into_are_not_cleared() -> None:
    limits = Limits(max_batch_size=2, max_num_tokens=64)
    scheduler = Scheduler(SlotPool(16), limits, load=lambda _: 2 * BLOCK)
    prompt = sequence(list(range(4 * BLOCK)))
    scheduler.add(prompt)
    turn = scheduler.decide()
    assert turn.items[0].start == 2 * BLOCK
    assert sorted(turn.fresh_slots) == sorted(prompt.slots[2:])


async def test_slots_are_cleared_after_the_last_turns_saves_are_waited_for(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`begin_pass` is where a stream waits for saves that still read these slots."""
    engine = make_engine(host_bytes=1 << 20)
    calls = []
    runner, connector = engine._runner, engine._connector
    begin, clear = connector.begin_pass, runner._clear
    monkeypatch.setattr(connector, "begin_pass", lambda *a: (calls.append("wait"), begin(*a)))
    monkeypatch.setattr(runner, "_clear", lambda slots: (calls.append("clear"), clear(slots)))
    await tokens(engine, request(some_prompt(20), 1))
    assert calls == ["wait", "clear"]
