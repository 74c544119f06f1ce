"""The way from an engine's thread back to the coroutine that waits for one request."""

import asyncio
from collections.abc import Sequence

from actors.engine import TokenChunk

Item = TokenChunk | Exception


class Channel:
    """A queue from the engine's thread to one coroutine; the only thing both sides touch.

    Make it on the event loop that reads it.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Item] = asyncio.Queue()

    def put(self, item: Item) -> bool:
        """Hand over from the engine's thread; False when the event loop is gone."""
        return not put_all([(self, item)])

    async def get(self) -> TokenChunk:
        """The next chunk; raises what the engine sent instead of one."""
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def _take_in(self, item: Item) -> None:
        self._queue.put_nowait(item)


def put_all(items: Sequence[tuple[Channel, Item]]) -> list[Channel]:
    """Hand all over, in order; the channels whose event loops are gone: nobody will read.

    Each loop is woken once: to wake it lets go of the interpreter's lock, and an engine's thread
    that did so for every request of a batch would stand in line for it as often.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Channel, Item]]] = {}
    for channel, item in items:
        by_loop.setdefault(channel._loop, []).append((channel, item))
    gone = [batch for loop, batch in by_loop.items() if not _handed_over(loop, batch)]
    return [channel for batch in gone for channel, _ in batch]


def _handed_over(loop: asyncio.AbstractEventLoop, batch: Sequence[tuple[Channel, Item]]) -> bool:
    try:
        loop.call_soon_threadsafe(_take_in_all, batch)
    except RuntimeError:  # the loop is closed
        return False
    return True


def _take_in_all(batch: Sequence[tuple[Channel, Item]]) -> None:
    for channel, item in batch:
        channel._take_in(item)
