"""A line in the log, now and then, that says what the cache has done.

A user of plain `trtllm-serve` has no dashboard of ours. A hit rate of zero must be visible, and
why: nothing saved, nothing found, or a store that fails.
"""

import logging
import threading
from collections.abc import Callable

from shared_cache.cache_stats import CacheStats
from shared_cache.faults import FaultLog
from shared_cache.threads import start_daemon

logger = logging.getLogger(__name__)


def summary(stats: CacheStats) -> str:
    """One line about the counters since the start."""
    host = stats.host
    owner = "" if host.is_connected else ", THE ARENA'S OWNER IS AWAY"
    return (
        f"staged {stats.staged_blocks} blocks ({stats.fetched_blocks} from the tiers, "
        f"{stats.peer_blocks} by other processes of this node), saved {stats.saved_blocks}, "
        f"waiting {stats.pending_saves}, dropped {stats.dropped_saves}; deadlines missed "
        f"{stats.deadline_misses}, store faults {stats.store_faults}; host memory "
        f"{host.used_slots} of {host.num_slots} blocks{owner}"
    )


class StatsLog:
    """Logs a cache's counters every `period_s` in which they changed, from its own thread."""

    def __init__(self, what: str, stats: Callable[[], CacheStats], period_s: float) -> None:
        self._what = what
        self._stats = stats
        self._period_s = period_s
        self._end = threading.Event()
        self._faults = FaultLog(logger)
        self._last = ""
        if period_s > 0:
            start_daemon(self._run, "kvcommons-stats")

    def tell(self) -> None:
        """Log the counters now, unless nothing changed since the last time."""
        with self._faults.caught("reading the cache's counters"):
            line = summary(self._stats())
            if line != self._last:
                logger.info("%s: %s", self._what, line)
            self._last = line

    def close(self) -> None:
        """Log a last time, and end."""
        if not self._end.is_set():
            self._end.set()
            self.tell()

    def _run(self) -> None:
        while not self._end.wait(self._period_s):
            self.tell()
