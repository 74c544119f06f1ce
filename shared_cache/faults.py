"""What happens when something fails behind the engine: count it, say so seldom, leave it alone.

A dead store would otherwise cost every request its full deadline and fill the log with one
traceback per block. Here a fault is counted always, logged at most once a minute, and a store that
failed is not asked again before a growing pause is over.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

from shared_cache.errors import StoreError

Clock = Callable[[], float]

LOG_INTERVAL_S = 60.0


class FaultLog:
    """Counts the faults of one component and logs at most one of them per `LOG_INTERVAL_S`."""

    def __init__(self, logger: logging.Logger, clock: Clock = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._lock = threading.Lock()
        self._num_faults = 0
        self._num_unlogged = 0
        self._next_log_s = float("-inf")

    @property
    def num_faults(self) -> int:
        """Faults since the start."""
        return self._num_faults

    def record(self, what: str, error: Exception | None = None) -> None:
        """Count a fault of `what`; a traceback is logged for errors that nobody foresaw."""
        with self._lock:
            self._num_faults += 1
            now_s = self._clock()
            if now_s < self._next_log_s:
                self._num_unlogged += 1
                return
            self._next_log_s = now_s + LOG_INTERVAL_S
            num_unlogged, self._num_unlogged = self._num_unlogged, 0
        foreseen = error is None or isinstance(error, StoreError)
        self._logger.warning(
            "%s: %s (%d more since the last such line)",
            what,
            error or "failed",
            num_unlogged,
            exc_info=None if foreseen else error,
        )

    @contextmanager
    def caught(self, what: str) -> Iterator[None]:
        """Run a block whose errors must not reach the caller: they are counted and logged."""
        try:
            yield
        except Exception as error:
            self.record(what, error)


class BackOff:
    """Says whether to try again: after each fault not before a pause that doubles up to a limit."""

    def __init__(self, clock: Clock, first_s: float = 1.0, longest_s: float = 30.0) -> None:
        self._clock = clock
        self._first_s = first_s
        self._longest_s = longest_s
        self._pause_s = 0.0
        self._until_s = float("-inf")

    @property
    def is_over(self) -> bool:
        """True when nothing failed lately."""
        return self._clock() >= self._until_s

    def fault(self) -> None:
        """Begin a pause; faults of tries that began before the running pause do not prolong it."""
        if not self.is_over:
            return
        self._pause_s = min(max(self._first_s, 2 * self._pause_s), self._longest_s)
        self._until_s = self._clock() + self._pause_s

    def success(self) -> None:
        """Forget the faults so far; a running pause still runs to its end."""
        if self.is_over:
            self._pause_s = 0.0


class StoreGuard:
    """Stands between the cache and one direction (reading, writing) of a store; thread-safe.

    A store that raises is not `usable` for a while. One that hangs (something has been under way
    for `patience_s`, and nothing has ended for so long) is not until something ends.
    """

    def __init__(self, what: str, patience_s: float, faults: FaultLog, clock: Clock) -> None:
        self._what = what
        self._patience_s = patience_s
        self._faults = faults
        self._clock = clock
        self._back_off = BackOff(clock)
        self._lock = threading.Lock()
        self._ids = count()
        self._started_s: dict[int, float] = {}
        self._overdue: set[int] = set()
        self._ended_s = float("-inf")
        self._num_faults = 0

    @property
    def num_faults(self) -> int:
        """Faults of this store in this direction since the start."""
        return self._num_faults

    def usable(self) -> bool:
        """Whether the store is to be asked now."""
        is_hanging = self.is_hanging()
        with self._lock:
            return not is_hanging and self._back_off.is_over

    def is_hanging(self) -> bool:
        """Whether nothing has come from the store for too long although something is awaited."""
        with self._lock:
            before_s = self._clock() - self._patience_s
            overdue = {id_ for id_, start_s in self._started_s.items() if start_s <= before_s}
            news = overdue - self._overdue
            self._overdue |= news
            self._num_faults += len(news)
            is_hanging = bool(overdue) and self._ended_s <= before_s
        for _ in news:
            self._faults.record(f"{self._what}: no answer for {self._patience_s:g} s")
        return is_hanging

    @contextmanager
    def operation(self) -> Iterator[None]:
        """Run one store operation; its errors begin a pause, are counted, and end here.

        Whatever a store raises is a fault of the store: third-party file systems raise anything.
        """
        with self._lock:
            operation_id = next(self._ids)
            self._started_s[operation_id] = self._clock()
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self._ended(operation_id, error)

    def _ended(self, operation_id: int, error: Exception | None) -> None:
        with self._lock:
            del self._started_s[operation_id]
            self._overdue.discard(operation_id)
            self._ended_s = self._clock()
            if error is None:
                self._back_off.success()
            else:
                self._num_faults += 1
                self._back_off.fault()
        if error is not None:
            self._faults.record(self._what, error)
