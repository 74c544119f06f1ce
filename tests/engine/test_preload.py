"""The beginning of a prompt is loaded before its request comes: nothing is computed for it."""

import asyncio
from unittest.mock import Mock

import pytest

from actors.engine import GenerationRequest
from actors.engines.torch.connector import ConnectorDriver
from actors.engines.torch.engine import TorchEngine
from shared_cache.errors import ModelError
from tests.engine.conftest import (
    BLOCK,
    Greedy,
    MakeEngine,
    chunks,
    request,
    some_prompt,
    tokens,
)
from tests.engine.test_parked import (
    OTHER,
    PROMPT,
    Replicas,
    replicas,  # noqa: F401
    saved,
    until,
    used,
)

LOOPS = ("plain", "overlapped")

WANTED = request(PROMPT)


async def ready(made: Replicas, *, beside: bool = True) -> TorchEngine:
    """An engine that has nothing of the saved prompt; `beside`: its loads are asynchronous."""
    await saved(made)
    engine = made.engine()
    assert engine.preload is None, "a CPU would copy in the engine's thread"
    engine._can_preload = True
    if not beside:
        engine._connector._scheduler._ahead_from_blocks = None
    return engine


async def preloaded(
    engine: TorchEngine, num_blocks: int = 3, wanted: GenerationRequest = WANTED
) -> range:
    assert engine.preload is not None
    return await engine.preload(wanted, num_blocks)


@pytest.mark.parametrize("beside", [True, False])
async def test_the_request_finds_on_the_device_what_was_loaded(
    beside: bool,
    replicas: Replicas,  # noqa: F811
    plain_greedy: Greedy,
) -> None:
    engine = await ready(replicas, beside=beside)
    loading = asyncio.create_task(preloaded(engine))
    if beside:
        await until(lambda: replicas.copier.held)
        assert not loading.done()
        replicas.copier.let_go()
        replicas.copier.holds = False
    assert await loading == range(3 * BLOCK)
    assert used(engine) == 0
    assert engine.stats().prefill_tokens == 0
    received = await chunks(engine, request(PROMPT))
    assert [t for chunk in received for t in chunk.token_ids] == plain_greedy(PROMPT, 12)
    receipt = received[0].receipt
    assert receipt is not None
    assert (receipt.device, receipt.host, receipt.computed) == (3 * BLOCK, 3 * BLOCK, 3)
    stats = engine.stats().kv_cache
    assert (stats.reused_blocks, stats.missed_blocks) == (6, 0)
    await until(lambda: used(engine) == 0)
    assert engine._connector._scheduler.num_tracked_requests == 0


async def test_what_is_nowhere_is_not_waited_for(replicas: Replicas) -> None:  # noqa: F811
    engine = await ready(replicas)
    assert not await preloaded(engine, 2, request(OTHER, 1))
    assert used(engine) == 0


async def test_a_request_that_comes_meanwhile_waits_for_it(
    replicas: Replicas,  # noqa: F811
    plain_greedy: Greedy,
) -> None:
    engine = await ready(replicas)
    loading = asyncio.create_task(preloaded(engine))
    await until(lambda: replicas.copier.held)
    waiting = asyncio.create_task(chunks(engine, request(PROMPT)))
    assert await tokens(engine, request(OTHER)) == plain_greedy(OTHER, 12)
    assert not waiting.done()
    replicas.copier.let_go()
    await until(lambda: len(replicas.copier.held) == 2)
    replicas.copier.let_go()
    assert await loading == range(3 * BLOCK)
    received = await waiting
    assert received[0].receipt is not None
    assert received[0].receipt.device == 3 * BLOCK
    assert [t for chunk in received for t in chunk.token_ids] == plain_greedy(PROMPT, 12)


async def test_one_that_is_given_up_keeps_its_slots_until_the_copy_is_done(
    replicas: Replicas,  # noqa: F811
    plain_greedy: Greedy,
) -> None:
    engine = await ready(replicas)
    loading = asyncio.create_task(preloaded(engine))
    await until(lambda: replicas.copier.held)
    loading.cancel()
    await until(lambda: engine.stats().num_running == 0)
    assert used(engine) == 3
    replicas.copier.let_go()
    await until(lambda: used(engine) == 0)
    replicas.copier.holds = False
    assert await tokens(engine, request(OTHER)) == plain_greedy(OTHER, 12)


async def test_what_follows_is_saved_and_shared_all_the_same(
    replicas: Replicas,  # noqa: F811
    plain_greedy: Greedy,
) -> None:
    """Nothing of a prompt that was loaded and not computed is taken for left uncomputed."""
    engine = await ready(replicas, beside=False)
    await preloaded(engine)
    longer = [*PROMPT, *some_prompt(3 * BLOCK, seed=9)]
    assert await tokens(engine, request(longer, 1)) == plain_greedy(longer, 1)
    assert replicas.cache is not None
    assert replicas.cache.flush(60)
    other = replicas.engine()
    other._connector._scheduler._ahead_from_blocks = None
    first = (await chunks(other, request(longer, 1)))[0].receipt
    assert first is not None
    assert first.host == (len(longer) - 1) // BLOCK * BLOCK


async def test_a_load_that_fails_fails_that_alone(
    replicas: Replicas,  # noqa: F811
    plain_greedy: Greedy,
) -> None:
    engine = await ready(replicas)
    replicas.copier.fails = True
    with pytest.raises(ModelError, match="on fire"):
        await preloaded(engine)
    assert await tokens(engine, request(OTHER)) == plain_greedy(OTHER, 12)
    await until(lambda: used(engine) == 0)


async def test_no_more_is_loaded_than_is_asked_for(replicas: Replicas) -> None:  # noqa: F811
    engine = await ready(replicas, beside=False)
    assert await preloaded(engine, 1) == range(BLOCK)
    assert not await preloaded(engine, 1), "it is there"
    assert await preloaded(engine) == range(BLOCK, 3 * BLOCK)
    assert not await preloaded(engine, 1, request(PROMPT[:BLOCK]))
    assert await preloaded(engine, 99) == range(3 * BLOCK, 6 * BLOCK), "all that there is"


@pytest.mark.parametrize("hold_s", [0.0, 0.3])
async def test_the_end_of_a_load_is_told(
    hold_s: float,
    replicas: Replicas,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Turns that look for it would take the interpreter's lock from who brings the next blocks."""
    monkeypatch.setattr("actors.engines.torch.engine._LOADING_TOLD_S", 1000.0)
    engine = await ready(replicas)
    turn = Mock(side_effect=engine._turns.turn)
    monkeypatch.setattr(engine._turns, "turn", turn)
    loading = asyncio.create_task(preloaded(engine))
    await until(lambda: replicas.copier.held)
    await asyncio.sleep(hold_s)
    assert turn.call_count < 5
    replicas.copier.let_go()
    assert await asyncio.wait_for(loading, 30) == range(3 * BLOCK)


async def test_a_worker_that_tells_no_end_is_asked_for_it(
    replicas: Replicas,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ConnectorDriver, "tell_when_loaded", lambda *_: False)
    monkeypatch.setattr("actors.engines.torch.engine._LOADING_TOLD_S", 1000.0)
    engine = await ready(replicas)
    loading = asyncio.create_task(preloaded(engine))
    await until(lambda: replicas.copier.held)
    replicas.copier.let_go()
    assert await asyncio.wait_for(loading, 30) == range(3 * BLOCK)


async def test_no_drafts_are_prepared_for_what_is_only_loaded(make_engine: MakeEngine) -> None:
    """That reads the whole prompt on the event loop, once for each of its parts."""
    drafts = {"decoding_type": "NGram", "max_draft_len": 6, "max_matching_ngram_size": 2}
    factory = make_engine(speculative_config=drafts)._factory
    assert factory.make(WANTED).sequence.lookup is not None
    assert factory.make(WANTED, only_load=3).sequence.lookup is None
