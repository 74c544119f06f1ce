"""Several parts of one job at once: copying to and from memory is bound by one core, not by memory,
and questions to a store by how long one answer takes.

The caller works too, and helper threads take what is left while they are free, so nobody waits for
a helper that is busy elsewhere. Failure prevented: a queue of jobs behind one store that hangs (who
finds others in line for a helper does not ask for one), and threads by the dozen in a process that
has a model to compute.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import cache
from typing import Generic, TypeVar

from shared_cache.threads import IoThreads

T = TypeVar("T")

MAX_HELPERS = 12
"""Helper threads of a process: 16 copies at once from the page cache were 1.7 times as fast as 8 on
16 cores, 12 of them nearly as fast; there are never more than cores beside the caller's."""

ASKING_HELPERS = 7
"""The same for jobs that wait for a store and hardly compute: threads of their own, made when first
needed."""


def run_all(jobs: Iterable[Callable[[], T]]) -> list[T]:
    """What the jobs return, in order. They may run at the same time, in any order.

    After a job has raised no other one begins; that error is raised here when all have ended.
    """
    return _run_all(_Batch(jobs), _num_helpers(), "kvcommons-copy")


def ask_all(questions: Iterable[Callable[[], T]]) -> list[T]:
    """The same for jobs that hardly do anything but wait for a store."""
    return _run_all(_Batch(questions), ASKING_HELPERS, "kvcommons-ask")


def _run_all(batch: "_Batch[T]", num_helpers: int, name: str) -> list[T]:
    num_needed = min(num_helpers, batch.num_jobs - 1)
    if num_needed > 0:
        threads = _helpers(os.getpid(), num_helpers, name)
        for _ in range(min(num_needed, num_helpers - threads.num_queued)):
            threads.submit(batch.work)
    batch.work()
    return batch.results()


class _Batch(Generic[T]):
    def __init__(self, jobs: Iterable[Callable[[], T]]) -> None:
        self._waiting = deque(enumerate(jobs))
        self.num_jobs = len(self._waiting)
        self._num_running = 0
        self._results: dict[int, T] = {}
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def work(self) -> None:
        """Run waiting jobs until there are none left."""
        while True:
            with self._changed:
                if not self._waiting:
                    return
                index, job = self._waiting.popleft()
                self._num_running += 1
            self._run(index, job)
            del job  # what it holds, buffers perhaps, must not outlive it here

    def results(self) -> list[T]:
        """Wait for the jobs that are running; their results, or the first error."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_running)
            if self._error is not None:
                raise self._error
            return [self._results[index] for index in range(self.num_jobs)]

    def _run(self, index: int, job: Callable[[], T]) -> None:
        error: BaseException | None = None
        try:
            self._results[index] = job()
        except BaseException as raised:  # whatever it is, it is the caller's to handle
            error = raised
        with self._changed:
            self._num_running -= 1
            if error is not None:
                self._error = self._error or error
                self._waiting.clear()
            self._changed.notify_all()


def _num_helpers() -> int:
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MAX_HELPERS, (num_cores or 1) - 1)


@cache
def _helpers(process_id: int, num_threads: int, name: str) -> IoThreads:
    """Helper threads of a process; a forked child has none of its parent's, so gets its own."""
    return IoThreads(num_threads, name)
