"""What caches tell the router: a replica of its own memory, the owner of an arena of a machine's.

Who asks says how far it has read; what is asked again after a lost answer is told again.
"""

import asyncio
import threading
from array import array
from collections.abc import Callable, Mapping

from actors.cache_changes import CacheChanges, CacheTier, ChangeLog, Cursor, TierChanges, netted
from actors.routing.index import routing_keys
from shared_cache.host.journal import EventKind
from shared_cache.host.news import ArenaNews

_STORED = EventKind.STORED
BLOCKS_AT_ONCE = 16_384
"""Blocks that an arena's owner describes in one go: its clients wait meanwhile."""


class CacheReports:
    """Follows an engine's changes; thread-safe.

    `own_host_blocks`: the replica's cache keeps so many blocks in host memory that no other process
    reads, and does not tell which. All that was on the device is saved there, so it is taken to
    hold what was there last. 0: it has none, or a machine's owner tells of it.
    """

    def __init__(self, epoch: str, own_host_blocks: int = 0) -> None:
        self._device = ChangeLog("device", epoch)
        self._host = ChangeLog("host", epoch, max_held=own_host_blocks or None)
        self._keeps_all = own_host_blocks > 0
        self._lock = threading.Lock()

    def since(
        self, take: Callable[[], CacheChanges], read: Mapping[CacheTier, Cursor]
    ) -> tuple[TierChanges, ...]:
        """What has changed behind the cursors; `take` asks the engine (`take_cache_changes`)."""
        with self._lock:
            self._note(take())
            return self._device.since(read.get("device")), self._host.since(read.get("host"))

    def _note(self, changes: CacheChanges) -> None:
        if changes.is_cleared:
            self._device.clear()
            if not self._keeps_all:
                self._host.clear()
        stored, offloaded, removed = (
            routing_keys(one) for one in (changes.stored, changes.offloaded, changes.removed)
        )
        self._device.change(stored, offloaded + removed)
        if self._keeps_all:
            self._host.change(stored, ())
        else:
            self._host.change(offloaded, stored + removed)


async def arena_changes(
    news: ArenaNews, read: Mapping[CacheTier, Cursor]
) -> tuple[TierChanges, TierChanges]:
    """What an arena got and lost (`host`), and which of its blocks the shared tier has got."""
    cursor = read.get("host")
    if cursor is None or cursor != read.get("shared") or cursor.epoch != news.epoch:
        return await _everything(news)
    told = news.since(cursor.next)
    if told.first != cursor.next:
        return await _everything(news)
    end = Cursor(news.epoch, told.next)
    keys = routing_keys([name for _, name in told.events])
    kinds = [kind for kind, _ in told.events]
    stored = array("Q", {key for kind, key in zip(kinds, keys, strict=True) if kind is _STORED})
    came, went = netted(
        (key, kind is EventKind.BROUGHT)
        for kind, key in zip(kinds, keys, strict=True)
        if kind is not _STORED
    )
    return (
        TierChanges("host", told.first, end, came, went),
        TierChanges("shared", told.first, end, stored),
    )


async def _everything(news: ArenaNews) -> tuple[TierChanges, TierChanges]:
    """A snapshot; the owner serves its clients in between, and what changes then is told next."""
    number, blocks = news.everything()
    end = Cursor(news.epoch, number)
    here, stored = array("Q"), array("Q")
    for start in range(0, len(blocks), BLOCKS_AT_ONCE):
        part = blocks[start : start + BLOCKS_AT_ONCE]
        here += routing_keys([name for name, _ in part])
        stored += routing_keys([name for name, is_stored in part if is_stored])
        await asyncio.sleep(0)
    return (
        TierChanges("host", number, end, here, is_snapshot=True),
        TierChanges("shared", number, end, stored, is_snapshot=True),
    )
