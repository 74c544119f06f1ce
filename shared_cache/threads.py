"""Threads for work that may hang: store I/O.

The standard pool joins its threads at interpreter exit without a limit, so one store that never
answers would keep a process from ending. These threads are daemons, are joined for a bounded time,
and are left behind with a log line when they are stuck.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

Job = Callable[[], None]


class IoThreads:
    """A fixed number of threads that run jobs in the order they were submitted."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> bool:
        """Queue `job`; False, and nothing done, once closed. A job that raises is logged."""
        if self._closed.is_set():
            return False
        self._jobs.put(job)
        return True

    def close(self, timeout_s: float) -> bool:
        """Drop queued jobs and wait for the running ones; False when one did not end in time."""
        self._closed.set()
        for _ in self._threads:
            self._jobs.put(None)
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        num_stuck = sum(thread.is_alive() for thread in self._threads)
        if num_stuck:
            logger.warning("%s: %d threads are stuck and left behind", self._name, num_stuck)
        return not num_stuck

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._closed.is_set():
                continue
            try:
                job()
            except Exception:
                logger.exception("%s: a job failed", self._name)
            del job  # a waiting thread must not keep the last job's buffers alive
