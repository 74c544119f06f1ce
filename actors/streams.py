"""Streams: everything that is ready at the same time travels in one message; several in one.

A message between processes costs about a millisecond, more than a small model needs for a token.
Sending each token alone would make the messages the bottleneck; waiting for more tokens would
delay the first one. So the sender takes what is there: one item when the receiver keeps up, more
when it does not.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

Item = TypeVar("Item")


async def batches(stream: AsyncGenerator[Item, None]) -> AsyncGenerator[tuple[Item, ...], None]:
    """The items of `stream` in order, grouped by what was ready; never waits to make a group.

    An error of the stream comes after the items before it. Closing this closes the stream.
    """
    ready: list[Item] = []
    wake = asyncio.Event()

    async def pump() -> None:
        async with aclosing(stream):
            async for item in stream:
                ready.append(item)
                wake.set()

    task = asyncio.create_task(pump())
    task.add_done_callback(lambda _: wake.set())
    try:
        while not (task.done() and not ready):
            await wake.wait()
            wake.clear()
            if ready:
                items = tuple(ready)
                ready.clear()
                yield items
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def merge(
    streams: Sequence[AsyncGenerator[Item, None]],
) -> AsyncGenerator[tuple[int, Item], None]:
    """The items of all streams as they come, each with the index of its stream.

    Ends with the last stream, or with the first error. Closing this closes all streams.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Item] | int] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[Item, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait((index, item))
        finally:
            queue.put_nowait(index)

    tasks = [asyncio.create_task(pump(*numbered)) for numbered in enumerate(streams)]
    try:
        num_ended = 0
        while num_ended < len(tasks):
            entry = await queue.get()
            if isinstance(entry, int):
                num_ended += 1
                await tasks[entry]
            else:
                yield entry
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
