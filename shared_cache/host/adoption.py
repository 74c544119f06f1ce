"""Adoption: an owner takes over what a crashed one left, without a wrong byte or a lost reader.

Nothing is believed: a record must carry its own checksum, a block's bytes theirs. Yet a slot whose
record or bytes are damaged may still be read by a living client, as may one that is still being
checked. So every slot that is not known to be free is held back, reserved by nobody, until its
block is adopted or all living clients of the old owner have said what they hold.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shared_cache.checksum import block_checksum
from shared_cache.faults import FaultLog
from shared_cache.host.arena import OwnedArena
from shared_cache.host.extents import SLOT_ALIGNMENT_BYTES
from shared_cache.host.folder import ArenaPaths
from shared_cache.host.index import HostIndex
from shared_cache.host.journal import ArenaJournal
from shared_cache.host.record_format import DamagedRecordsError, ReservedRecord, UsedRecord

logger = logging.getLogger(__name__)

NOBODY = 0
"""The holder of slots that are held back; clients have other numbers."""

LOG_WAITING_S = 60.0
"""So often it is said for whom the adopted blocks wait."""

_BATCH_BYTES = 64 << 20


@dataclass(slots=True)
class _Waiting:
    """Somebody who wants to go on when these slots have been checked."""

    slots: set[int]
    go_on: Callable[[], None]


class Adoption:
    """What is left to adopt of one arena. Used by the owner's event loop alone.

    `living` are the clients of the old owner that may still come back.
    """

    def __init__(
        self,
        paths: ArenaPaths,
        arena: OwnedArena,
        index: HostIndex,
        journal: ArenaJournal,
        living: Collection[int],
    ) -> None:
        self._paths = paths
        self._arena = arena
        self._index = index
        self._journal = journal
        self._living = set(living)
        self._unchecked: dict[int, UsedRecord] = {}
        self._being_checked: dict[int, UsedRecord] = {}
        self._held_back: set[int] = set()
        self._waiting: list[_Waiting] = []
        self._all_returned = asyncio.Event()
        self._num_adopted = 0
        self._faults = FaultLog(logger)

    def begin(self) -> None:
        """Take over the namespaces, extents and reservations; blocks follow with `run`.

        Raises `DamagedRecordsError` when the tables contradict each other.
        """
        records, index = self._arena.records, self._index
        namespaces = records.namespaces()
        for number, (fingerprint, block_bytes) in enumerate(namespaces):
            if index.open_namespace(fingerprint, block_bytes) != number:
                raise DamagedRecordsError("a namespace is there twice")
        for extent, entry in enumerate(records.extents()):
            if entry is None:
                continue
            namespace, slot_bytes = entry
            if not (
                namespace < len(namespaces)
                and 0 <= slot_bytes - namespaces[namespace][1] < SLOT_ALIGNMENT_BYTES
            ):
                raise DamagedRecordsError(f"extent {extent} is of no known namespace")
            index.adopt_extent(extent, namespace)
            for slot in records.slots_of(extent):
                self._sort_out(slot, namespace)
        self._check_returned()

    def returned(self, holder: int) -> None:
        """A client of the old owner has said what it holds, or is dead."""
        self._living.discard(holder)
        self._check_returned()

    def when_checked(self, slots: Collection[int], go_on: Callable[[], None]) -> None:
        """Call `go_on` as soon as none of `slots` is left to check; they are checked next."""
        left = {s for s in slots if s in self._unchecked or s in self._being_checked}
        if not left:
            go_on()
            return
        self._waiting.append(_Waiting(left, go_on))
        urgent = {slot: self._unchecked.pop(slot) for slot in left if slot in self._unchecked}
        self._unchecked = urgent | self._unchecked

    def hand_over(self, slot: int, holder: int) -> bool:
        """Let `holder` have a slot that is held back, as reserved; False if it is not."""
        if slot not in self._held_back:
            return False
        self._held_back.discard(slot)
        self._let_go(slot)
        self._index.adopt_reserved(slot, holder)
        self._journal.reserved(slot, holder)
        return True

    async def run(self) -> None:
        """Check and adopt the blocks, then wait for the living clients, then thaw."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "kvcommons-adopt") as thread:
            while self._unchecked:
                batch = self._being_checked = self._next_batch()
                good = await loop.run_in_executor(thread, self._check, batch)
                self._being_checked = {}
                for slot in good:
                    self._adopt(slot, batch[slot])
                self._wake(batch)
        await self._wait_for_the_living()
        for slot in self._held_back:
            self._index.cancel(NOBODY, (slot,))
        self._held_back.clear()
        self._index.thaw()
        logger.info("adopted %d blocks of the last owner", self._num_adopted)

    async def _wait_for_the_living(self) -> None:
        """Return when all old clients have come back or died; says for whom it waits."""
        returned = asyncio.ensure_future(self._all_returned.wait())
        try:
            while not (await asyncio.wait((returned,), timeout=LOG_WAITING_S))[0]:
                logger.warning(
                    "no block from before the restart is evicted until these processes come back "
                    "or end: %s",
                    ", ".join(map(self._who, sorted(self._living))),
                )
        finally:
            returned.cancel()

    def _who(self, holder: int) -> str:
        """A client's number, and that of its process in its own container, if it noted it."""
        try:
            pid = self._paths.client(holder).read_text()
        except (OSError, ValueError):
            pid = ""
        return f"process {pid or 'unknown'} (client {holder:016x})"

    def _sort_out(self, slot: int, namespace: int) -> None:
        record = self._arena.records.read(slot)
        if record is None:
            return
        if isinstance(record, ReservedRecord):
            if record.holder in self._living:
                self._index.adopt_reserved(slot, record.holder)
            else:
                self._arena.records.set_free(slot)
            return
        self._index.adopt_reserved(slot, NOBODY)
        self._held_back.add(slot)
        if isinstance(record, UsedRecord) and record.namespace == namespace:
            self._unchecked[slot] = record

    def _next_batch(self) -> dict[int, UsedRecord]:
        batch: dict[int, UsedRecord] = {}
        num_bytes = 0
        sizes = [block_bytes for _, block_bytes in self._arena.records.namespaces()]
        for slot, record in self._unchecked.items():
            batch[slot] = record
            num_bytes += sizes[record.namespace]
            if num_bytes >= _BATCH_BYTES:
                break
        for slot in batch:
            del self._unchecked[slot]
        return batch

    def _check(self, batch: dict[int, UsedRecord]) -> Sequence[int]:
        """The slots whose bytes are those that were committed; runs in a thread."""
        sizes = [block_bytes for _, block_bytes in self._arena.records.namespaces()]
        good = []
        for slot, record in batch.items():
            start = slot * SLOT_ALIGNMENT_BYTES
            payload = self._arena.memory[start : start + sizes[record.namespace]]
            if block_checksum(record.block.block_hash, payload) == record.checksum:
                good.append(slot)
        if len(good) < len(batch):
            logger.warning("%d blocks are damaged and not adopted", len(batch) - len(good))
        return good

    def _adopt(self, slot: int, record: UsedRecord) -> None:
        """Adopt a checked block; one that was brought anew meanwhile stays held back."""
        self._let_go(slot)
        if self._index.adopt(record.namespace, slot, record.block):
            self._held_back.discard(slot)
            self._num_adopted += 1
        else:
            self._index.adopt_reserved(slot, NOBODY)

    def _let_go(self, slot: int) -> None:
        """Free a slot in the index for an instant; its record stays."""
        with self._journal.keeping((slot,)):
            self._index.cancel(NOBODY, (slot,))

    def _wake(self, checked: Collection[int]) -> None:
        for waiting in self._waiting:
            waiting.slots.difference_update(checked)
        ready = [waiting for waiting in self._waiting if not waiting.slots]
        self._waiting = [waiting for waiting in self._waiting if waiting.slots]
        for waiting in ready:
            with self._faults.caught("letting a client go on after its blocks were checked"):
                waiting.go_on()

    def _check_returned(self) -> None:
        if not self._living:
            self._all_returned.set()
