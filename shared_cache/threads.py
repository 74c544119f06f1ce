"""Threads for work that may hang: store I/O.

The standard pool joins its threads at interpreter exit without a limit, so one store that never
answers would keep a process from ending; and a call that never returns would hold one of its
threads for ever. These threads are daemons, can be replaced while they are stuck, and are left
behind with a log line when they are stuck at the end.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable

logger = logging.getLogger(__name__)

Job = Callable[[], None]


def join_all(threads: Iterable[threading.Thread], deadline_s: float) -> bool:
    """Wait for `threads` until `deadline_s` (of `time.monotonic`); False when one did not end."""
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
        if thread.is_alive():
            return False
    return True


def start_daemon(job: Job, name: str) -> threading.Thread | None:
    """A thread of its own for `job`; None, and nothing done, where no thread can be started.

    That is so once the interpreter is ending.
    """
    thread = threading.Thread(target=job, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        logger.warning("%s: no thread can be started: %s", name, error)
        return None
    return thread


class Crew:
    """Threads that do the same work again and again; one that is stuck can be replaced.

    `work` does one thing and returns False when there will be nothing to do any more.
    """

    def __init__(self, num_threads: int, name: str, work: Callable[[], bool]) -> None:
        self._name = name
        self._work = work
        self._lock = threading.Lock()
        self._members: set[threading.Thread] = set()
        self._left: list[threading.Thread] = []
        self._num_started = 0
        self._is_dismissed = False
        for _ in range(num_threads):
            self._start()

    @property
    def threads(self) -> list[threading.Thread]:
        """All that run still, those that were replaced included."""
        with self._lock:
            return [thread for thread in (*self._members, *self._left) if thread.is_alive()]

    def replace(self, thread: threading.Thread) -> None:
        """Start another thread for a stuck one of ours, which ends as soon as its call does."""
        with self._lock:
            if thread not in self._members or self._is_dismissed:
                return
            self._members.discard(thread)
            self._left = [one for one in self._left if one.is_alive()] + [thread]
        self._start()

    def is_replaced(self, thread: threading.Thread) -> bool:
        """Whether `thread` was one of ours that was stuck, and that nobody counts on any more."""
        with self._lock:
            return thread in self._left

    def dismiss(self) -> None:
        """Replace nobody from now on."""
        with self._lock:
            self._is_dismissed = True

    def _start(self) -> None:
        with self._lock:
            name = f"{self._name}-{self._num_started}"
            self._num_started += 1
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._members.add(thread)
            try:
                thread.start()
            except RuntimeError as error:
                self._members.discard(thread)
                logger.warning("%s: no thread can be started: %s", name, error)

    def _run(self) -> None:
        while threading.current_thread() in self._members and self._work():
            pass


class IoThreads:
    """A fixed number of threads that run jobs in the order they were submitted."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self.crew = Crew(num_threads, name, self._work)

    @property
    def num_queued(self) -> int:
        """About how many jobs no thread has begun."""
        return self._jobs.qsize()

    def submit(self, job: Job) -> bool:
        """Queue `job`; False, and nothing done, once closed. A job that raises is logged."""
        if self._closed.is_set():
            return False
        self._jobs.put(job)
        return True

    def stop(self) -> None:
        """Drop queued jobs; the running ones end by themselves. Waits for nothing."""
        self._closed.set()
        self.crew.dismiss()
        for _ in self.crew.threads:
            self._jobs.put(None)

    def close(self, timeout_s: float) -> bool:
        """Drop queued jobs and wait for the running ones; False when one did not end in time."""
        self.stop()
        join_all(self.crew.threads, time.monotonic() + timeout_s)
        num_stuck = len(self.crew.threads)
        if num_stuck:
            logger.warning("%s: %d threads are stuck and left behind", self._name, num_stuck)
        return not num_stuck

    def _work(self) -> bool:
        job = self._jobs.get()
        if job is None:
            return False
        if not self._closed.is_set():
            try:
                job()
            except Exception:
                logger.exception("%s: a job failed", self._name)
        return True  # and `job` ends here: a waiting thread must not keep its buffers alive
