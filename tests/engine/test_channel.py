"""From an engine's thread to the coroutines that read: in order, one wake-up for all of a turn."""

import asyncio
import threading

import pytest

from actors.engine import TokenChunk
from actors.engines.channel import Channel, put_all
from shared_cache.errors import ModelError
from tests.engine.conftest import MakeEngine, request, some_prompt, tokens


def chunk(token: int) -> TokenChunk:
    return TokenChunk((token,), "")


async def test_each_reader_gets_its_own_in_order() -> None:
    loop, wakes = asyncio.get_running_loop(), []
    first, second = Channel(), Channel()
    call_soon = loop.call_soon_threadsafe
    loop.call_soon_threadsafe = lambda *args: wakes.append(1) or call_soon(*args)  # type: ignore
    items = [(first, chunk(1)), (second, chunk(2)), (first, chunk(3)), (second, ModelError("no"))]
    thread = threading.Thread(target=put_all, args=(items,))
    thread.start()
    thread.join()
    assert [(await first.get()).token_ids for _ in range(2)] == [(1,), (3,)]
    assert (await second.get()).token_ids == (2,)
    with pytest.raises(ModelError, match="no"):
        await second.get()
    assert len(wakes) == 1


async def test_who_waits_on_a_loop_that_is_gone_is_named() -> None:
    async def made() -> Channel:
        return Channel()

    gone = await asyncio.to_thread(asyncio.run, made())
    here = Channel()
    assert put_all([(gone, chunk(1)), (here, chunk(2)), (gone, chunk(3))]) == [gone, gone]
    assert (await here.get()).token_ids == (2,)
    assert not gone.put(chunk(1))


async def test_a_request_whose_reader_s_loop_is_gone_is_aborted(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def begin() -> None:
        stream = engine.generate(request(some_prompt(9), 400, "left", ignore_eos=True))
        await anext(stream)
        streams.append(stream)  # kept: nothing closes it

    streams: list[object] = []
    thread = threading.Thread(target=_run_and_leave, args=(begin(),))
    thread.start()
    thread.join()
    assert len(await tokens(engine, request(some_prompt(9, 1), 5, ignore_eos=True))) == 5
    while engine.stats().num_running:
        await asyncio.sleep(0.001)
    assert engine.stats().generated_tokens < 400


def _run_and_leave(work: object) -> None:
    """As a process that stops its loop in the middle: no stream is closed."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(work)  # type: ignore[arg-type]
    loop.close()
