"""What happens when something fails behind the engine: count it, say so seldom, leave it alone.

A dead store would otherwise cost every request its full deadline and fill the log with one
traceback per block. Here a fault is counted always, logged at most once a minute, and a store that
failed is not asked again before a growing pause is over.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from shared_cache.errors import StoreError, StoreReadOnlyError
from shared_cache.threads import start_daemon

Clock = Callable[[], float]

LOG_INTERVAL_S = 60.0

REFUSED_PAUSE_S, LONGEST_REFUSED_PAUSE_S = 60.0, 900.0
"""How long a store is left alone that refuses: rights change seldom, but credentials do expire."""

LONGEST_PROBE_PAUSE_S = 300.0
"""How long a store that hangs is at most left alone; every try may cost a thread for ever."""

LOST_PATIENCES = 10
"""A call that takes so many times what is borne, while later ones end, will not end any more."""


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


@dataclass(eq=False, slots=True)
class _Call:
    """A store call that is under way; `again` repeats it without touching anybody's memory."""

    kind: str
    started_s: float
    thread: threading.Thread
    again: Callable[[], object] | None
    is_overdue: bool = False
    is_outrun: bool = False


class StoreGuard:
    """Stands between the cache and one direction (reading, writing) of a store; thread-safe.

    A store that raises is not `usable` for a while, one that refuses for a long while. One that
    hangs (a call has been under way for `patience_s`, and nothing of its kind has ended for so
    long) is not until something ends: so that something can, who asks has such a call repeated in
    a spare thread, after pauses that grow. A call that hangs while later ones of its kind end is
    lost: `on_lost` is told of its thread, so that somebody takes its place.
    """

    def __init__(self, what: str, patience_s: float, faults: FaultLog, clock: Clock) -> None:
        self.on_lost: Callable[[threading.Thread], None] = lambda thread: None
        self._what = what
        self._patience_s = patience_s
        self._faults = faults
        self._clock = clock
        self._back_off = BackOff(clock)
        self._refusals = BackOff(clock, REFUSED_PAUSE_S, LONGEST_REFUSED_PAUSE_S)
        self._probes = BackOff(clock, longest_s=LONGEST_PROBE_PAUSE_S)
        self._lock = threading.Lock()
        self._calls: set[_Call] = set()
        self._ended_s: dict[str, float] = {}
        self._num_faults = 0

    @property
    def num_faults(self) -> int:
        """Faults of this store in this direction since the start."""
        return self._num_faults

    @property
    def refuses(self) -> bool:
        """Whether the store said lately that it will not do what it is asked."""
        with self._lock:
            return not self._refusals.is_over

    def usable(self) -> bool:
        """Whether the store is to be asked now; one that hangs is asked in the background."""
        if self.is_hanging():
            self._probe()
            return False
        with self._lock:
            self._probes.success()
            return self._back_off.is_over and self._refusals.is_over

    def is_hanging(self) -> bool:
        """Whether nothing has come from the store for too long although something is awaited."""
        with self._lock:
            before_s = self._clock() - self._patience_s
            num_new = self._mark_overdue(before_s)
            is_hanging = any(self._is_evidence(call, before_s) for call in self._calls)
        self._record_overdue(num_new)
        return is_hanging

    @contextmanager
    def operation(
        self, kind: str = "", again: Callable[[], object] | None = None, *, is_probe: bool = False
    ) -> Iterator[None]:
        """Run one store operation; its errors begin a pause, are counted, and end here.

        Whatever a store raises is a fault of the store: third-party file systems raise anything.
        """
        call = _Call(kind, self._clock(), threading.current_thread(), again)
        with self._lock:
            self._calls.add(call)
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self._ended(call, error, is_probe)

    def _ended(self, call: _Call, error: Exception | None, is_probe: bool) -> None:
        with self._lock:
            now_s = self._clock()
            self._calls.discard(call)
            num_new = self._mark_overdue(now_s - self._patience_s)
            self._ended_s[call.kind] = now_s
            lost = self._outrun_by(call, now_s, is_probe)
            if error is None:
                self._back_off.success()
                self._refusals.success()
            else:
                self._num_faults += 1
                is_refusal = isinstance(error, StoreReadOnlyError)
                (self._refusals if is_refusal else self._back_off).fault()
        self._record_overdue(num_new)
        for one in lost:
            self.on_lost(one.thread)
        if error is not None:
            self._faults.record(self._what, error)

    def _outrun_by(self, call: _Call, now_s: float, is_probe: bool) -> list[_Call]:
        """Forget the overdue calls that `call` shows to be lost; the lock is held.

        A store that is only slow lets calls overtake each other too: they count as lost much later.
        """
        older = [
            one
            for one in self._calls
            if one.is_overdue and one.kind == call.kind and one.started_s < call.started_s
        ]
        lost_before_s = now_s - LOST_PATIENCES * self._patience_s
        for one in older:
            one.is_outrun = True
        lost = [one for one in older if is_probe or one.started_s <= lost_before_s]
        self._calls.difference_update(lost)
        return lost

    def _mark_overdue(self, before_s: float) -> int:
        """Count the calls that are overdue now and were not before; the lock is held."""
        news = [one for one in self._calls if not one.is_overdue and one.started_s <= before_s]
        for one in news:
            one.is_overdue = True
        self._num_faults += len(news)
        return len(news)

    def _record_overdue(self, num_new: int) -> None:
        for _ in range(num_new):
            self._faults.record(f"{self._what}: no answer for {self._patience_s:g} s")

    def _is_evidence(self, call: _Call, before_s: float) -> bool:
        ended_s = self._ended_s.get(call.kind, float("-inf"))
        return call.is_overdue and not call.is_outrun and ended_s <= before_s

    def _probe(self) -> None:
        """Have the last call of each kind that hangs repeated, unless that was tried just now."""
        with self._lock:
            if not self._probes.is_over:
                return
            before_s = self._clock() - self._patience_s
            hanging = [one for one in self._calls if self._is_evidence(one, before_s)]
            last = {one.kind: one for one in sorted(hanging, key=lambda one: one.started_s)}
            probes = [one for one in last.values() if one.again is not None]
            if not probes:
                return
            self._probes.fault()
        start_daemon(partial(self._repeat, probes), "kvcommons-probe")

    def _repeat(self, calls: Sequence[_Call]) -> None:
        for call in calls:
            if call.again is not None:
                with self.operation(call.kind, call.again, is_probe=True):
                    call.again()
