"""The namespaces of one arena, and who gives up an extent when another one has no room.

Without shares, the first model on a node would keep the whole arena for as long as it is busy, and
a second one find no room; with fixed shares, memory would lie idle while only one model runs.
"""

import logging
from collections.abc import Iterator

from shared_cache.errors import ConfigError
from shared_cache.host.block_table import BlockTable
from shared_cache.host.blocks import evict_coldest
from shared_cache.host.extents import Extent, ExtentTable, SlotPool, slot_bytes_of
from shared_cache.host.interface import HostStats
from shared_cache.host.terms import Clock, Journal

logger = logging.getLogger(__name__)

SEARCH_PAUSE_S = 1.0
"""How long a namespace does not search again after it found nothing: a search looks at much."""

_SAMPLE_BLOCKS = 16


class Namespaces:
    """The blocks of each namespace, and the extents that they share."""

    def __init__(self, extents: ExtentTable, journal: Journal, clock: Clock) -> None:
        self._extents = extents
        self._journal = journal
        self._clock = clock
        self._tables: list[BlockTable] = []
        self._number_of: dict[str, int] = {}
        self._without_room: set[int] = set()

    def open(self, fingerprint: str, block_bytes: int) -> int:
        """See `HostIndex.open_namespace`."""
        known = self._number_of.get(fingerprint)
        if known is not None:
            if self._tables[known].block_bytes != block_bytes:
                raise ValueError(f"blocks of namespace {fingerprint} do not take {block_bytes}")
            return known
        slot_bytes, extent_bytes = slot_bytes_of(block_bytes), self._extents.extent_bytes
        if not 0 < slot_bytes <= extent_bytes:
            raise ConfigError(
                f"a block of this model takes {slot_bytes} bytes, and the arena is cut into "
                f"extents of {extent_bytes}; raise cache.host.bytes"
            )
        number = self._number_of[fingerprint] = len(self._tables)
        pool = SlotPool(slot_bytes, extent_bytes)
        self._tables.append(BlockTable(number, block_bytes, pool, self._journal))
        return number

    def table(self, namespace: int) -> BlockTable:
        """One namespace's blocks; raises `ValueError` for a number that `open` did not give."""
        if not 0 <= namespace < len(self._tables):
            raise ValueError(f"namespace {namespace} was not opened")
        return self._tables[namespace]

    def all(self) -> Iterator[BlockTable]:
        """Every namespace's blocks."""
        return iter(self._tables)

    def make_room(self, table: BlockTable, num_slots: int) -> None:
        """Let a namespace have so many free slots, or as many as can be had quickly.

        An extent's memory takes a while to be had, and nobody else is answered meanwhile: so it is
        one extent at most, and nothing is evicted then; who needs more asks again.
        """
        pool, now_s = table.pool, self._clock()
        if pool.num_free < num_slots and self._add_extent(table, now_s):
            return
        evict_coldest(table.groups, lambda _: num_slots - pool.num_free, now_s)

    def adopt_extent(self, extent: int, namespace: int) -> None:
        """See `HostIndex.adopt_extent`."""
        table = self.table(namespace)
        self._extents.adopt(extent)
        table.pool.add(extent)

    def stats(self, namespace: int) -> HostStats:
        """See `HostIndex.stats`."""
        table = self.table(namespace)
        pool = table.pool
        num_unassigned_slots = self._extents.num_unassigned * pool.slots_per_extent
        return HostStats(
            num_slots=pool.num_slots + num_unassigned_slots,
            free_slots=pool.num_free + num_unassigned_slots,
            used_slots=len(table.blocks),
            reserved_slots=pool.num_slots - pool.num_free - len(table.blocks),
            leased_slots=table.num_leased,
            evicted_blocks=table.num_evicted,
            block_bytes=table.block_bytes,
            peer_blocks=table.num_from_peers,
        )

    def _add_extent(self, taker: BlockTable, now_s: float) -> bool:
        """Give `taker` one more extent, nobody's or another's; False if there is none to be had."""
        if not self._extents.num_unassigned and not self._free_extent(taker, now_s):
            if not taker.pool.extents:
                self._warn_of_no_room(taker)
            return False
        number = self._extents.assign(taker.namespace, taker.pool.slot_bytes)
        if number is None:
            return False
        taker.pool.add(number)
        return True

    def _warn_of_no_room(self, taker: BlockTable) -> None:
        """Say once that a namespace has not one slot."""
        if taker.namespace in self._without_room:
            return
        self._without_room.add(taker.namespace)
        fingerprint = next(f for f, n in self._number_of.items() if n == taker.namespace)
        logger.warning(
            "there is no memory for the blocks of namespace %s: others use all %d extents of the "
            "arena; raise cache.host.bytes, or give this model an arena of its own "
            "(cache.host.name)",
            fingerprint,
            self._extents.num_obtainable,
        )

    def _free_extent(self, taker: BlockTable, now_s: float) -> bool:
        """Make an extent of another namespace nobody's; False if none may be taken now."""
        if now_s < taker.next_search_s:
            return False
        found = next(self._candidates(taker, now_s), None)
        if found is None:
            taker.next_search_s = now_s + SEARCH_PAUSE_S
            return False
        giver, extent = found
        giver.clear(extent)
        giver.pool.remove(extent)
        self._extents.give_back(extent.number, giver.namespace)
        return True

    def _candidates(self, taker: BlockTable, now_s: float) -> Iterator[tuple[BlockTable, Extent]]:
        """Extents that `taker` may have of others: empty ones, the coldest within its share."""
        others = [table for table in self._tables if table is not taker]
        for table in others:
            for extent in table.pool.extents.values():
                if extent.num_free == extent.num_slots:
                    yield table, extent
        share = self._fair_share()
        if len(taker.pool.extents) >= share:
            return
        givers = [t for t in others if len(t.pool.extents) > (share if t.num_attached else 0)]
        rich = [(table, extent) for table in givers for extent in table.pool.extents.values()]
        for table, extent in sorted(rich, key=lambda pair: _mean_last_use(pair[1])):
            if _may_go(extent, now_s):
                yield table, extent

    def _fair_share(self) -> int:
        """Extents for each namespace that somebody uses; the others have no share."""
        num_active = sum(table.num_attached > 0 for table in self._tables)
        return max(1, self._extents.num_obtainable // max(1, num_active))


def _may_go(extent: Extent, now_s: float) -> bool:
    return not extent.num_reserved and not any(
        block is not None and block.is_kept(now_s) for block in extent.blocks
    )


def _mean_last_use(extent: Extent) -> float:
    """How warm an extent is, from a sample of its blocks."""
    sample = extent.blocks[:: max(1, len(extent.blocks) // _SAMPLE_BLOCKS)]
    uses = [block.last_use for block in sample if block is not None]
    return sum(uses) / len(uses) if uses else 0.0
