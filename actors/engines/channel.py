"""The way from an engine's thread back to the coroutine that waits for one request."""

import asyncio

from actors.engine import TokenChunk


class Channel:
    """A queue from the engine's thread to one coroutine; the only thing both sides touch.

    Make it on the event loop that reads it.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[TokenChunk | Exception] = asyncio.Queue()

    def put(self, item: TokenChunk | Exception) -> bool:
        """Hand over from the engine's thread; False when the event loop is gone."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody will read
            return False
        return True

    async def get(self) -> TokenChunk:
        """The next chunk; raises what the engine sent instead of one."""
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item
