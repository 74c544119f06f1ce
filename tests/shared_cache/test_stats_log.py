"""A line now and then that says what the cache did, and nothing while it does nothing."""

import logging
import threading
from dataclasses import replace

import pytest

from shared_cache.cache_stats import CacheStats
from shared_cache.connector.stats_log import StatsLog, summary
from shared_cache.host.interface import HostStats

STATS = CacheStats(
    host=HostStats(100, 60, 40, 0, 0, 0, 4096),
    staged_blocks=12,
    fetched_blocks=5,
    fetched_bytes=0,
    fetch_s=0.0,
    deadline_misses=1,
    saved_blocks=7,
    saved_bytes=0,
    dropped_saves=2,
    store_faults=3,
    pending_saves=4,
    peer_blocks=6,
)


def test_the_line_has_what_explains_a_hit_rate_of_zero() -> None:
    line = summary(STATS)
    for part in ("staged 12 blocks (5 from the tiers", "saved 7", "waiting 4", "dropped 2"):
        assert part in line
    assert "store faults 3" in line
    assert "40 of 100 blocks" in line
    assert "AWAY" not in line
    away = replace(STATS, host=replace(STATS.host, is_connected=False))
    assert "OWNER IS AWAY" in summary(away)


def test_a_line_is_written_when_something_changed(caplog: pytest.LogCaptureFixture) -> None:
    stats = STATS
    log = StatsLog("cache", lambda: stats, 0.0)
    with caplog.at_level(logging.INFO):
        log.tell()
        log.tell()
        stats = replace(STATS, saved_blocks=8)
        log.close()
        log.close()
    assert len(caplog.records) == 2
    assert "saved 8" in caplog.records[1].message


def test_the_thread_tells_until_it_is_closed() -> None:
    told = threading.Event()

    def stats() -> CacheStats:
        told.set()
        return STATS

    log = StatsLog("cache", stats, 0.001)
    assert told.wait(10)
    log.close()
    (thread,) = [t for t in threading.enumerate() if t.name == "kvcommons-stats"] or [None]
    if thread is not None:
        thread.join(10)
        assert not thread.is_alive()


def test_counters_that_cannot_be_read_end_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def stats() -> CacheStats:
        raise RuntimeError("closed")

    log = StatsLog("cache", stats, 0.0)
    log.tell()
    assert "reading the cache's counters" in caplog.text
