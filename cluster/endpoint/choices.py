"""The choices of one request while they come out: several streams in, batches of what is ready out.

It prevents three things: a prompt that is computed `n` times because its choices start together, a
request that runs on after its time, and a message for each token to a client that reads slowly.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from actors.dispatch import RoutedChunk
from cluster.endpoint.refusals import TimedOutError

Stream = AsyncGenerator[RoutedChunk, None]
Batch = list[tuple[int, RoutedChunk]]
Batches = AsyncGenerator[Batch, None]


async def ready_batches(
    streams: Sequence[Callable[[], Stream]], num_per_prompt: int, timeout_s: float
) -> Batches:
    """What has come out of all choices since the last batch, each with the index of its choice.

    The first of every `num_per_prompt` choices goes ahead; the others of the same prompt begin with
    its first token, and find the prompt computed. Raises `TimedOutError` after `timeout_s`, or the
    first error of any stream; closing this closes all streams.
    """
    pumps = _Pumps()
    leaders = [asyncio.Event() for _ in streams[::num_per_prompt]]
    timer = asyncio.get_running_loop().call_later(timeout_s, pumps.expire, timeout_s)
    try:
        for index, stream in enumerate(streams):
            prompt, is_follower = divmod(index, num_per_prompt)
            pumps.start(index, stream, leaders[prompt], bool(is_follower))
        while batch := await pumps.next():
            yield batch
    finally:
        timer.cancel()
        await pumps.close()


class _Pumps:
    """A task for each stream, and what they have brought."""

    def __init__(self) -> None:
        self._ready: Batch = []
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._num_running = 0
        self._error: Exception | None = None

    def start(
        self, index: int, stream: Callable[[], Stream], leader: asyncio.Event, follows: bool
    ) -> None:
        self._num_running += 1
        task = asyncio.create_task(self._pump(index, stream, leader, follows))
        self._tasks.append(task)

    async def next(self) -> Batch:
        """What is ready, as soon as anything is; empty at the end. Errors come after all else.

        But for the end of the time: a client that reads slowly would have something ready for ever.
        """
        while not self._ready and self._error is None and self._num_running:
            self._wake.clear()
            await self._wake.wait()
        batch, self._ready = self._ready, []
        is_over = isinstance(self._error, TimedOutError)
        if self._error is not None and (is_over or not batch):
            raise self._error
        return batch

    def expire(self, timeout_s: float) -> None:
        """The time is up."""
        self._fail(
            TimedOutError(
                f"this request was not done within serve.request_timeout_s = {timeout_s:g} s; ask "
                "for fewer tokens"
            )
        )

    async def close(self) -> None:
        """End all streams."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._wake.set()

    async def _pump(
        self, index: int, stream: Callable[[], Stream], leader: asyncio.Event, follows: bool
    ) -> None:
        try:
            if follows:
                await leader.wait()
            async with aclosing(stream()) as chunks:
                async for routed in chunks:
                    self._ready.append((index, routed))
                    self._wake.set()
                    leader.set()
        except Exception as error:
            self._fail(error)
        finally:
            leader.set()
            self._num_running -= 1
            self._wake.set()
