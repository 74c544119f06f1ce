"""The one event loop from which TensorRT-LLM is called.

Its results and statistics come through queues that belong to the loop, or to no loop, of whoever
called first; calls of the other sort then fail or hang. A replica's streams and its control calls
run on different loops. So all calls are made here, on a loop that lives as long as the engine.
"""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """An event loop in a thread of its own. A daemon: it keeps no process alive."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="kvcommons-trtllm", daemon=True)
        self._thread.start()

    def post(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run `work` there; cancelling the result cancels it. `RuntimeError` once stopped."""
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("the engine's loop has stopped")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """The result of `work`; `TimeoutError` when it takes longer, it is then cancelled."""
        running = self.post(_within(work, timeout_s))
        return running.result()

    def stop(self) -> None:
        """Cancel what runs there, and end; again is a no-op."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


async def _within(work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    try:
        return await asyncio.wait_for(work, timeout_s)
    except asyncio.TimeoutError as error:  # another class than the built-in one before 3.11
        raise TimeoutError(f"no answer within {timeout_s:g} s") from error
