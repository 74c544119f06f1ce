"""The one thread of an engine that computes, from loading the weights on.

OpenMP keeps a team of threads for every thread that ever computed in parallel, and as soon as all
teams together are more than the cores, its barriers sleep instead of spinning: measured, every
forward pass of several tokens then takes a quarter longer, although the other team is idle. So
weights are loaded, pools made and passes run on one and the same thread, and no other thread of the
process computes.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class ComputeThread:
    """Runs callables one after the other, in inference mode. A daemon: it keeps no process alive.

    `num_threads` cores compute together; None leaves that to torch.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        self._num_threads = num_threads
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]
        self._work = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvcommons-engine", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[], T]) -> T:
        """Run `work` there and wait for its result, or raise what it raises."""
        return self.post(work).result()

    def post(self, work: Callable[[], T]) -> "Future[T]":
        """Run `work` there, after what was posted before."""
        future: Future[T] = Future()
        self._work.put((work, future))
        return future

    def stop(self) -> None:
        """End the thread after what was posted; returns when it has ended. Again is a no-op."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        with torch.inference_mode():
            while (entry := self._work.get()) is not None:
                work, future = entry
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
                del entry, work, future  # they may hold a pool
