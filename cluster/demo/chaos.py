"""A death in the middle of an answer, once: the way to show that no request is lost.

Killing at some time of the clock may hit a replica that is idle, which proves nothing. So the
replica to die is the one whose answer is just streaming in.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from actors.dispatch import RoutedChunk
from actors.engine import GenerationRequest
from cluster.demo.asking import Asks


class KillOnce:
    """A dispatcher that kills the replica behind the first stream after `after_requests` others."""

    def __init__(self, inner: Asks, kill: Callable[[str], None], after_requests: int) -> None:
        self.killed: str | None = None
        self._inner = inner
        self._kill = kill
        self._num_left = after_requests

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RoutedChunk, None]:
        """See `Dispatcher.generate`."""
        is_victim = self._num_left == 0
        self._num_left -= 1
        async with aclosing(self._inner.generate(request)) as stream:
            async for item in stream:
                if is_victim and item.chunk.token_ids and item.chunk.finish_reason is None:
                    is_victim = False
                    self.killed = item.replica_id
                    self._kill(item.replica_id)
                yield item
