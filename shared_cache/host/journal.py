"""The journal of an arena's index: every change goes into the records, and is told as an event.

What a process reads or writes now must not look free after a restart of the owner, not even for the
time that it takes to note a change. While a client's holdings are being sorted out, the index gives
its slots back and takes them again within one step; `keeping` leaves their records as they are.
"""

from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from enum import IntEnum
from itertools import islice

from shared_cache.hashing import BlockHash
from shared_cache.host.arena import OwnedArena
from shared_cache.host.record_format import ReservedRecord, UsedRecord
from shared_cache.host.terms import BlockRecord, Journal


class EventKind(IntEnum):
    """What happened to a block."""

    BROUGHT = 1
    EVICTED = 2
    STORED = 3


class EventRing:
    """The last events of an arena, numbered; older ones are forgotten."""

    def __init__(self, first_number: int, max_events: int = 1 << 16) -> None:
        """Numbers begin at `first_number`, which grows from owner to owner and names this one."""
        self.epoch = str(first_number)
        self._first = first_number
        self._max_events = max_events
        self._events: deque[tuple[int, EventKind, BlockHash]] = deque()

    @property
    def next_number(self) -> int:
        """The number of the event that comes next."""
        return self._first + len(self._events)

    def add(self, namespace: int, kind: EventKind, block_hash: BlockHash) -> None:
        """Number and keep one event."""
        self._events.append((namespace, kind, block_hash))
        if len(self._events) > self._max_events:
            self._events.popleft()
            self._first += 1

    def since(
        self, number: int, namespace: int | None
    ) -> tuple[int, int, list[tuple[EventKind, BlockHash]]]:
        """The number of the first event looked at, that of the next one to come, and the events.

        Those of other namespaces are left out (None: none are). A `number` from the future begins
        with the oldest.
        """
        end = self.next_number
        first = number if self._first <= number <= end else self._first
        wanted = islice(self._events, first - self._first, None)
        told = [(k, name) for owner, k, name in wanted if namespace is None or owner == namespace]
        return first, end, told


class ArenaJournal(Journal):
    """Writes the records of one arena."""

    def __init__(self, arena: OwnedArena, events: EventRing) -> None:
        self._arena = arena
        self._records = arena.records
        self._events = events
        self._kept: Collection[int] = ()

    @contextmanager
    def keeping(self, slots: Collection[int]) -> Iterator[None]:
        """Within, the records of these slots stay as they are."""
        self._kept = slots
        try:
            yield
        finally:
            self._kept = ()

    def reserved(self, slot: int, holder: int) -> None:
        """See `Journal.reserved`."""
        if slot not in self._kept:
            self._records.write(slot, ReservedRecord(holder))

    def published(self, slot: int, namespace: int, record: BlockRecord, checksum: int) -> None:
        """See `Journal.published`."""
        self._records.write(slot, UsedRecord(namespace, record, checksum))
        self._events.add(namespace, EventKind.BROUGHT, record.block_hash)
        if record.is_stored:
            self._events.add(namespace, EventKind.STORED, record.block_hash)

    def stored(self, slot: int) -> None:
        """See `Journal.stored`."""
        self._records.set_stored(slot)
        self._tell(slot, EventKind.STORED)

    def freed(self, slot: int) -> None:
        """See `Journal.freed`."""
        if slot not in self._kept:
            self._tell(slot, EventKind.EVICTED)
            self._records.set_free(slot)

    def extent_assigned(self, extent: int, namespace: int, slot_bytes: int) -> bool:
        """See `Journal.extent_assigned`."""
        return self._arena.assign_extent(extent, namespace, slot_bytes)

    def _tell(self, slot: int, kind: EventKind) -> None:
        block = self._records.block_in(slot)
        if block is not None:
            self._events.add(block[0], kind, block[1])
