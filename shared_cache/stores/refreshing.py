"""Refreshing: what a store remembers of where blocks lie is renewed from a listing, now and then.

A run that another process has written is found by its first block at once; the blocks inside it are
found only by who has seen its head. Failure prevented: paying for that more than it is worth. It is
done in a thread of its own, which nobody waits for, and which rests far longer than it works.
"""

import logging
import random
import threading
import time
from collections.abc import Callable

from shared_cache.faults import FaultLog

logger = logging.getLogger(__name__)

FIRST_WITHIN_S = 5.0
"""Processes that were started together must not list a store together."""

INTERVAL_S = 600.0

MAX_TIME_SHARE = 0.02
"""Part of the time that may be spent on it: a store that takes long is listed less often."""

CLOSE_TIMEOUT_S = 1.0


class Refresher:
    """Calls `refresh` again and again from a thread of its own; a call that raises is counted."""

    def __init__(
        self,
        refresh: Callable[[], object],
        first_within_s: float | None = None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._refresh = refresh
        self._first_within_s = FIRST_WITHIN_S if first_within_s is None else first_within_s
        self._interval_s = interval_s
        self._faults = FaultLog(logger)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="kvcommons-refresh", daemon=True)

    @property
    def num_faults(self) -> int:
        """Calls that failed."""
        return self._faults.num_faults

    def start(self) -> None:
        """Begin; the first call is within `first_within_s`."""
        self._thread.start()

    def close(self) -> None:
        """Stop; a call that does not end within `CLOSE_TIMEOUT_S` is left behind."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    def _work(self) -> None:
        wait_s = random.uniform(0.0, self._first_within_s)
        while not self._closing.wait(wait_s):
            start_s = time.monotonic()
            with self._faults.caught("looking through the store"):
                self._refresh()
            took_s = time.monotonic() - start_s
            wait_s = max(self._interval_s * random.uniform(0.5, 1.5), took_s / MAX_TIME_SHARE)
