"""The host tier's bookkeeping: which slot holds which block, who holds it, what goes next.

It moves no bytes and reads no clock but the one it is given, so every order of events can be
tested. What it prevents: a slot handed out twice, a leased block evicted under its reader, a
half-written block found by a match, a dead holder's leases kept for ever, one tenant's documents
pushing out everybody else's.

Every slot of a namespace is in exactly one state:

    free -> reserved (being written) -> used (published; leased by any number of holders) -> free
"""

from collections.abc import Sequence

from shared_cache.hashing import BlockHash
from shared_cache.host.extents import ExtentTable
from shared_cache.host.holders import Holder
from shared_cache.host.interface import HostStats, NewRun
from shared_cache.host.publishing import Publisher
from shared_cache.host.shares import Namespaces
from shared_cache.host.terms import (
    BlockRecord,
    Claim,
    Clock,
    Grant,
    IndexRules,
    Journal,
    StoreAdmission,
)
from shared_cache.host.turns import Turns

__all__ = [
    "BlockRecord",
    "Claim",
    "Clock",
    "Grant",
    "HostIndex",
    "IndexRules",
    "Journal",
    "StoreAdmission",
]


class HostIndex:
    """Slots, reservations and leases of one arena, for all its holders and namespaces.

    A holder is a process (a number that its owner gives); what it leased or reserved ends with
    `detach`. A slot is the page number of its first byte in the arena (`offset // 4096`). Memory is
    handed to namespaces in extents of `extent_bytes`. A namespace that lacks room takes extents
    that are nobody's or empty; while it has less than its fair share (idle namespaces have none),
    it also takes the coldest extent whose blocks may all go from those that have more; then it
    evicts its own blocks.

    Not thread-safe. Breaking the protocol (committing a slot that is not reserved by this holder)
    raises `ValueError` and changes nothing.
    """

    def __init__(
        self,
        arena_bytes: int,
        extent_bytes: int,
        rules: IndexRules,
        journal: Journal,
        clock: Clock,
    ) -> None:
        extents = ExtentTable(arena_bytes, extent_bytes, journal, clock)
        self._namespaces = Namespaces(extents, journal, clock)
        self._publisher = Publisher(rules, journal, clock)
        self._journal = journal
        self._clock = clock
        self._holders: dict[int, Holder] = {}
        self._wants_stored = rules.admission != "never"
        self._turns = Turns(clock)

    def open_namespace(self, fingerprint: str, block_bytes: int) -> int:
        """The number of a namespace, new or known; they count from 0.

        Raises `ConfigError` when a block does not fit into an extent.
        """
        return self._namespaces.open(fingerprint, block_bytes)

    def attach(self, holder: int, namespace: int) -> None:
        """A holder begins to use a namespace."""
        table = self._namespaces.table(namespace)
        tables = self._new_or_known(holder).tables
        table.num_attached += table not in tables
        tables.add(table)

    def detach(self, holder: int) -> None:
        """A holder is gone: its leases, reservations and store duties end; nothing else does."""
        gone = self._holders.pop(holder, None)
        if gone is None:
            return
        self._end_reservations(gone, list(gone.reserved))
        gone.release_all()
        for table in self._namespaces.all():
            table.give_up_storing(holder)
        for table in gone.tables:
            table.num_attached -= 1

    def lease(self, holder: int, namespace: int, hashes: Sequence[BlockHash], first: int) -> Grant:
        """See `HostTier.lease`: the leading blocks of `hashes[first:]`, once more for `holder`."""
        table, turn = self._namespaces.table(namespace), self._turns.next()
        if self._wants_stored:
            table.recheck_turn = self._turns.unchecked
        seen = table.touch(hashes[:first], turn)
        grant = self._holder(holder).grant(table, hashes[first:], turn)
        table.accessed([*seen, *hashes[first : first + len(grant.slots)]])
        return grant

    def claim(self, holder: int, namespace: int, hashes: Sequence[BlockHash]) -> Claim:
        """See `HostTier.claim`; never waits. The reserved slots are claimed for their hashes.

        They end before a block that is here, too.
        """
        who, table = self._holder(holder), self._namespaces.table(namespace)
        grant = self.lease(holder, namespace, hashes, 0)
        start = len(grant.slots)
        wanted = table.num_unclaimed(hashes[start:])
        slots = self.reserve(holder, namespace, wanted)
        claimed = hashes[start : start + len(slots)]
        who.claimed.update(zip(slots, claimed, strict=True))
        table.claims.update(claimed)
        end = start + len(slots)
        is_coming = end < len(hashes) and self.is_coming(namespace, hashes[end])
        return Claim(grant, slots, is_coming)

    def reserve(self, holder: int, namespace: int, num_slots: int) -> tuple[int, ...]:
        """Up to `num_slots` slots for new blocks of any name, evicting if need be."""
        who, table = self._holder(holder), self._namespaces.table(namespace)
        self._namespaces.make_room(table, num_slots)
        slots = tuple(table.pool.take(num_slots))
        who.reserved.update(dict.fromkeys(slots, table))
        for slot in slots:
            self._journal.reserved(slot, holder)
        return slots

    def commit(
        self,
        holder: int,
        namespace: int,
        slots: Sequence[int],
        run: NewRun,
    ) -> Grant:
        """See `HostTier.commit`; `run.checksums` has one for each block."""
        who, table = self._holder(holder), self._namespaces.table(namespace)
        if not len(slots) == len(run.hashes) == len(run.checksums):
            raise ValueError(
                f"{len(slots)} slots, {len(run.hashes)} hashes, {len(run.checksums)} checksums"
            )
        who.check_reserved(slots, table)
        if not slots:
            return Grant(())
        for slot in slots:
            who.end_reservation(slot)
        turn = self._turns.next()
        num_here = self._publisher.publish(table, slots, run, holder, turn)
        return who.grant(table, run.hashes[:num_here], turn)

    def cancel(self, holder: int, slots: Sequence[int]) -> None:
        """Give reserved slots back unwritten."""
        who = self._holder(holder)
        who.check_reserved(slots)
        self._end_reservations(who, slots)

    def release(self, holder: int, slots: Sequence[int]) -> None:
        """End one lease on each of `slots`; those that `holder` has no lease on are ignored."""
        self._holder(holder).release(slots)

    def stored(
        self, holder: int, namespace: int, hashes: Sequence[BlockHash], is_stored: bool
    ) -> None:
        """See `HostTier.stored`."""
        table = self._namespaces.table(namespace)
        if is_stored:
            table.stored(hashes, self._turns.now)
        else:
            table.not_stored(hashes, is_wanted=self._wants_stored)
            table.give_up_storing(holder, hashes)

    def in_use(self, namespace: int, hashes: Sequence[BlockHash]) -> list[int]:
        """See `HostTier.in_use`; their positions."""
        return self._namespaces.table(namespace).in_use(hashes, self._turns.unused())

    def pin(self, namespace: int, hashes: Sequence[BlockHash], ttl_s: float) -> int:
        """See `HostTier.pin`."""
        table = self._namespaces.table(namespace)
        if not ttl_s:
            return table.unpin(hashes)
        return table.pin(hashes, self._clock() + ttl_s)

    def is_coming(self, namespace: int, block_hash: BlockHash) -> bool:
        """Whether a holder has claimed this block and it has not come, from anybody."""
        table = self._namespaces.table(namespace)
        return block_hash in table.claims and block_hash not in table.blocks

    def drop(self, namespace: int, hashes: Sequence[BlockHash]) -> int:
        """Forget these blocks where they are not leased (damaged bytes); how many those were."""
        return self._namespaces.table(namespace).drop_idle(hashes)

    def adopt_extent(self, extent: int, namespace: int) -> None:
        """After a restart: this extent was cut for this namespace; its slots are free so far."""
        self._namespaces.adopt_extent(extent, namespace)

    def adopt(self, namespace: int, slot: int, record: BlockRecord) -> bool:
        """After a restart: `slot` of an adopted extent holds a block; False if it has one already.

        Freezes nothing by itself: until `thaw`, adopted blocks are never evicted (a holder that
        has not come back yet may have leased them). Also False if the block is here already; raises
        `ValueError` for a slot that is not of this namespace.
        """
        return self._publisher.adopt(self._namespaces.table(namespace), slot, record)

    def adopt_reserved(self, slot: int, holder: int) -> None:
        """After a restart: a living holder of the old owner is still writing into `slot`."""
        table = next((t for t in self._namespaces.all() if t.pool.has(slot)), None)
        if table is None or not table.pool.take_this(slot):
            raise ValueError(f"slot {slot} is in no adopted extent, or taken already")
        self._new_or_known(holder).reserved[slot] = table

    def adopt_lease(self, holder: int, namespace: int, slots: Sequence[int]) -> tuple[int, ...]:
        """After a restart: `holder` says it has these leased; those that hold a block."""
        who, table = self._new_or_known(holder), self._namespaces.table(namespace)
        found = [block for slot in slots if (block := table.pool.block_at(slot)) is not None]
        for block in found:
            who.lease(block)
        return tuple(block.slot for block in found)

    def thaw(self) -> None:
        """All living holders are back: what was adopted may be evicted from now on."""
        self._publisher.thaw()

    def blocks(self) -> list[tuple[BlockHash, bool]]:
        """All blocks of all namespaces, and whether the shared tier has each."""
        tables = self._namespaces.all()
        return [(b.block_hash, b.is_stored) for table in tables for b in table.blocks.values()]

    def stats(self, namespace: int) -> HostStats:
        """The counts of one namespace."""
        return self._namespaces.stats(namespace)

    def _end_reservations(self, who: Holder, slots: Sequence[int]) -> None:
        for slot in slots:
            table = who.reserved[slot]
            who.end_reservation(slot)
            table.free(slot)

    def _holder(self, number: int) -> Holder:
        holder = self._holders.get(number)
        if holder is None:
            raise ValueError(f"holder {number} is not attached")
        return holder

    def _new_or_known(self, number: int) -> Holder:
        return self._holders.setdefault(number, Holder(number))
