"""When to send what gathers: one message at a time, at once or a little later.

A message costs more than what it carries. So while one is on its way the next one gathers, and
what is not urgent waits a moment for something that is, to go along with it.
"""

import asyncio
from collections.abc import Awaitable, Callable

SendNext = Callable[[], Callable[[], Awaitable[None]]]
"""Sends what there is, before it returns; what it returns waits for the reply and takes it in."""


class BatchSender:
    """Sends in one event loop, and at its end what is left.

    `how_soon` is the seconds that what there is may wait; 0: it is urgent, None: there is nothing.
    """

    def __init__(self, send_next: SendNext, how_soon: Callable[[], float | None]) -> None:
        self._send_next = send_next
        self._how_soon = how_soon
        self._task: asyncio.Task[None] | None = None
        self._is_woken = False
        self._pause: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """There is something to send, perhaps something urgent: what comes now goes with it."""
        if self._task is not None:
            if self._pause is not None and self._how_soon() == 0:
                self._end_pause()
        elif not self._is_woken:
            self._is_woken = True
            asyncio.get_running_loop().call_soon(self._start)

    def _start(self) -> None:
        """What is urgent leaves here, not in a task that the end of a loop could cancel."""
        self._is_woken = False
        if self._task is None:
            take_in = self._send_next() if self._how_soon() == 0 else None
            self._task = asyncio.get_running_loop().create_task(self._go_on(take_in))
            self._task.add_done_callback(self._ended)

    async def _go_on(self, take_in: Callable[[], Awaitable[None]] | None) -> None:
        try:
            while True:
                if take_in is not None:
                    await take_in()
                wait_s = self._how_soon()
                if wait_s is None:
                    return
                if wait_s:
                    await self._gather(wait_s)
                take_in = self._send_next()
        finally:
            self._task = None

    async def _gather(self, wait_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._pause = loop.create_future()
        timer = loop.call_later(wait_s, self._end_pause)
        try:
            await self._pause
        finally:
            self._pause = None
            timer.cancel()

    def _end_pause(self) -> None:
        if self._pause is not None and not self._pause.done():
            self._pause.set_result(None)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        if task.cancelled():  # the loop ends, perhaps before the task began; nobody can wait
            self._task = None
            if self._how_soon() is not None:
                self._send_next()
