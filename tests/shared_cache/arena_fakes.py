"""What the tests of the index share: an arena's records as a dictionary, and a small arena.

The records hold the index to the order of events: no slot skips a state.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from shared_cache.eviction import EvictionPolicy, LruPolicy
from shared_cache.hashing import DEFAULT_SCOPE, BlockHash, ReuseScope
from shared_cache.host.index import (
    BlockRecord,
    Clock,
    Grant,
    HostIndex,
    IndexRules,
    StoreAdmission,
)
from shared_cache.host.interface import NewRun
from tests.shared_cache.fakes import FakeClock, chain_of

UNIT_BYTES = 4096


@dataclass
class Used:
    namespace: int
    record: BlockRecord
    checksum: int


@dataclass
class FakeJournal:
    """What the records would say; asserts that no slot skips a state."""

    extent_units: int
    has_memory: bool = True
    extents: dict[int, tuple[int, int]] = field(default_factory=dict)
    reserved_by: dict[int, int] = field(default_factory=dict)
    used: dict[int, Used] = field(default_factory=dict)
    given_back: set[int] = field(default_factory=set)
    with_memory: set[int] = field(default_factory=set)
    num_asked: int = 0
    on_freed: Callable[[int, Used], None] = lambda slot, used: None

    def reserved(self, slot: int, holder: int) -> None:
        self.check_slot(slot)
        assert slot not in self.used
        assert slot not in self.reserved_by
        self.reserved_by[slot] = holder

    def published(self, slot: int, namespace: int, record: BlockRecord, checksum: int) -> None:
        del self.reserved_by[slot]
        assert self.extents[slot // self.extent_units][0] == namespace
        self.used[slot] = Used(namespace, record, checksum)

    def stored(self, slot: int) -> None:
        used = self.used[slot]
        used.record = replace(used.record, is_stored=True)

    def freed(self, slot: int) -> None:
        if slot in self.used:
            self.on_freed(slot, self.used.pop(slot))
        else:
            del self.reserved_by[slot]

    def extent_assigned(self, extent: int, namespace: int, slot_bytes: int) -> bool:
        assert not any(slot // self.extent_units == extent for slot in self.taken)
        if not slot_bytes:
            assert self.extents.pop(extent)[0] == namespace
            self.given_back.add(extent)
            return True
        assert extent not in self.extents
        self.num_asked += 1
        if not self.has_memory and extent not in self.with_memory:
            return False
        self.with_memory.add(extent)
        self.extents[extent] = (namespace, slot_bytes)
        return True

    @property
    def taken(self) -> set[int]:
        return {*self.used, *self.reserved_by}

    def check_slot(self, slot: int) -> None:
        """A slot lies whole in its extent, where one of its size begins."""
        extent, offset = divmod(slot, self.extent_units)
        slot_units = self.extents[extent][1] // UNIT_BYTES
        assert offset % slot_units == 0
        assert offset + slot_units <= self.extent_units

    def slots_of(self, extent: int) -> set[int]:
        slot_units = self.extents[extent][1] // UNIT_BYTES
        first = extent * self.extent_units
        return {first + i * slot_units for i in range(self.extent_units // slot_units)}

    def replay(self, index: HostIndex) -> None:
        """Tell a fresh index what the records say, as a restarted owner does."""
        for extent, (namespace, _) in self.extents.items():
            index.adopt_extent(extent, namespace)
        for slot, used in self.used.items():
            assert index.adopt(used.namespace, slot, used.record)
        for slot, holder in self.reserved_by.items():
            index.adopt_reserved(slot, holder)


def make_index(
    rules: IndexRules, journal: FakeJournal, clock: Clock, num_extents: int
) -> HostIndex:
    extent_bytes = journal.extent_units * UNIT_BYTES
    return HostIndex(num_extents * extent_bytes, extent_bytes, rules, journal, clock)


def reserve_all(index: HostIndex, holder: int, namespace: int, num_slots: int) -> tuple[int, ...]:
    """Ask again until there are so many slots or none is left: one extent comes at a time."""
    slots: tuple[int, ...] = ()
    while more := index.reserve(holder, namespace, num_slots - len(slots)):
        slots += more
    return slots


def put(index: HostIndex, holder: int, namespace: int, run: NewRun) -> Grant:
    """Bring all blocks of a run; for tests in which there is room."""
    slots = reserve_all(index, holder, namespace, len(run.hashes))
    assert len(slots) == len(run.hashes)
    return index.commit(holder, namespace, slots, replace(run, checksums=(0,) * len(slots)))


A, B = 1, 2
"""Two holders."""

LIMITED = ReuseScope(cache_salt="limited")
HASHES = tuple(chain_of(8).hashes)


def lru(clock: Clock) -> EvictionPolicy:
    return LruPolicy()


class Arena:
    """An index over one extent and one namespace, unless told otherwise."""

    def __init__(
        self,
        num_slots: int = 8,
        admission: StoreAdmission = "always",
        quota_blocks: int | None = None,
        block_units: tuple[int, ...] = (1,),
    ) -> None:
        quotas = {} if quota_blocks is None else {LIMITED.tenant: quota_blocks * 4096}
        self.clock = FakeClock()
        self.journal = FakeJournal(num_slots)
        rules = IndexRules(lru, quotas, admission)
        self.index = make_index(rules, self.journal, self.clock, len(block_units))
        for number, units in enumerate(block_units):
            self.index.open_namespace(f"n{number}", units * 4096)
            self.index.attach(A, number)
            self.index.attach(B, number)

    def put(self, holder: int, run: NewRun, namespace: int = 0) -> Grant:
        return put(self.index, holder, namespace, run)

    def put_idle(self, run: NewRun, namespace: int = 0) -> None:
        """Bring a run that nobody reads any more."""
        self.index.release(A, self.put(A, run, namespace).slots)

    @property
    def names(self) -> set[BlockHash]:
        return {used.record.block_hash for used in self.journal.used.values()}


def run_of(
    start: int = 0, stop: int = 8, first_token: int = 0, scope: ReuseScope = DEFAULT_SCOPE
) -> NewRun:
    """The blocks from `start` to `stop` of a chain."""
    chain = chain_of(stop, first_token, scope)
    return NewRun(chain.parent_of(start), tuple(chain.hashes[start:]), scope.tenant)
