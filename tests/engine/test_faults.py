"""Aborts, failing passes, bad requests: each ends what it has to, and leaks no slot."""

import asyncio
import gc
import weakref

import pytest
import torch

from actors.engine import GenerationRequest, SamplingParams
from actors.engines.torch.engine import TorchEngine
from shared_cache.errors import ModelError, ReplicaUnavailableError, RequestError
from shared_cache.hashing import ReuseScope
from tests.engine.conftest import Greedy, MakeEngine, chunks, request, some_prompt, tokens

LOOPS = ("plain", "overlapped")


async def until_idle(engine: TorchEngine) -> None:
    """Return when the engine has nothing to do; the test's timeout is the limit."""
    while engine.stats().num_running or engine.stats().num_waiting:
        await asyncio.sleep(0.001)


async def test_closing_the_stream_aborts_and_frees_the_slots(
    make_engine: MakeEngine, plain_greedy: Greedy
) -> None:
    engine = make_engine()
    stream = engine.generate(request(some_prompt(20), 480, ignore_eos=True))
    other = asyncio.create_task(tokens(engine, request(some_prompt(30), 40)))
    await anext(stream)
    await stream.aclose()
    assert await other == plain_greedy(some_prompt(30), 40)
    await until_idle(engine)
    stats = engine.stats()
    assert stats.kv_cache.used_num_blocks == 0
    assert stats.generated_tokens < 480


async def test_a_waiting_request_can_be_aborted(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_size=1)
    running = asyncio.create_task(tokens(engine, request(some_prompt(9), 60, ignore_eos=True)))
    waiting = asyncio.create_task(tokens(engine, request(some_prompt(9, 1), 60)))
    while not engine.stats().num_waiting:
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert len(await running) == 60
    await until_idle(engine)
    assert engine.stats().kv_cache.used_num_blocks == 0


async def test_a_failing_pass_fails_its_requests_and_no_other(
    make_engine: MakeEngine, plain_greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    prompt = some_prompt(20)

    def break_down(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as patch:
        patch.setattr("actors.engines.torch.forward.PlainForward.logits", break_down)
        results = await asyncio.gather(
            *[tokens(engine, request(prompt)) for _ in range(3)], return_exceptions=True
        )
    assert [type(result) for result in results] == [ModelError] * 3
    assert "on fire" in str(results[0])
    assert engine.stats().kv_cache.used_num_blocks == 0
    assert engine.is_alive()
    assert await tokens(engine, request(prompt)) == plain_greedy(prompt, 12)


async def test_logits_that_are_not_finite_fail_that_request_alone(
    make_engine: MakeEngine, plain_greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_num_tokens=64)
    poisoned, healthy = [250, *some_prompt(15)], some_prompt(9, 1)
    weight = engine._runner._forward._network.model.embed_tokens.weight
    assert 250 not in healthy
    row = weight[250].clone()
    with torch.inference_mode():
        weight[250] = float("nan")
    results = await asyncio.gather(
        *[tokens(engine, request(p)) for p in (poisoned, healthy)], return_exceptions=True
    )
    with torch.inference_mode():
        weight[250] = row
    assert isinstance(results[0], ModelError)
    assert "not finite" in str(results[0])
    assert results[1] == plain_greedy(healthy, 12)
    # The slots that held NaN are used again: together, a short request is padded to a longer one.
    others = [some_prompt(4, 2), some_prompt(6, 3)]
    outputs = await asyncio.gather(*[tokens(engine, request(p)) for p in others])
    assert outputs == [plain_greedy(p, 12) for p in others]


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        (request([]), "prompt is empty"),
        (request([3, 259]), "token id 259"),
        (request([3, -1]), "token id -1"),
        (request([3] * 512), "prompt has 512 tokens.*512"),
        (request([3], temperature=-1), "temperature"),
        (request([3], 0), "max_tokens"),
        (GenerationRequest("x", (3, 4), scope=ReuseScope(lora_id="a")), "LoRA"),
        (GenerationRequest("x", (3, 4), num_output_so_far=2), "num_output_so_far"),
        (
            GenerationRequest("x", (3, 4, 5), SamplingParams(max_tokens=2), num_output_so_far=2),
            "num_output_so_far",
        ),
    ],
)
async def test_what_can_never_be_served_is_refused(
    wanted: GenerationRequest, named: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(pool_tokens=512)
    with pytest.raises(RequestError, match=named):
        await chunks(engine, wanted)
    assert engine.stats().num_turns == 0


async def test_closing_the_engine_ends_what_runs_and_refuses_more(make_engine: MakeEngine) -> None:
    engine = make_engine()
    stream = engine.generate(request(some_prompt(20), 480, ignore_eos=True))
    await anext(stream)
    pool = weakref.ref(engine._runner._pool.tensor)
    await asyncio.to_thread(engine.close)
    gc.collect()
    assert pool() is None, "the pool's memory is still held"
    assert [chunk async for chunk in stream][-1].finish_reason == "abort"
    assert not engine.is_alive()
    assert engine.stats().kv_cache.used_num_blocks == 0
    with pytest.raises(ReplicaUnavailableError, match="closed"):
        await chunks(engine, request(some_prompt(5)))
    engine.close()


async def test_an_engine_that_breaks_says_so(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()

    def broken() -> None:
        raise KeyError("bookkeeping")

    monkeypatch.setattr(engine._turns.scheduler, "decide", broken)
    for _ in range(2):
        with pytest.raises(ReplicaUnavailableError, match="bookkeeping"):
            await tokens(engine, request(some_prompt(5)))
    assert not engine.is_alive()


def test_an_event_loop_that_is_gone_aborts_its_requests(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def leave_open() -> None:
        stream = engine.generate(request(some_prompt(9), 480, ignore_eos=True))
        await anext(stream)
        LEFT_OPEN.append(stream)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave_open())
    loop.close()
    asyncio.run(until_idle(engine))
    assert engine.stats().generated_tokens < 480
    LEFT_OPEN.clear()


LEFT_OPEN: list[object] = []
