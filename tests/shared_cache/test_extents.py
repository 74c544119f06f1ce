"""Memory of one arena for several namespaces: who gets which part of it, and who gives it up."""

import pytest

from shared_cache.errors import ConfigError
from shared_cache.eviction import LruPolicy
from shared_cache.hashing import BlockHash
from shared_cache.host.extents import ExtentTable, SlotPool, slot_bytes_of
from shared_cache.host.index import HostIndex, IndexRules
from shared_cache.host.interface import NewRun
from tests.shared_cache.arena_fakes import FakeJournal, make_index, put, reserve_all
from tests.shared_cache.fakes import FakeClock, chain_of

EXTENT_BYTES = 10 * 4096


def pool_of(block_bytes: int, *extents: int) -> SlotPool:
    pool = SlotPool(slot_bytes_of(block_bytes), EXTENT_BYTES)
    for number in extents:
        pool.add(number)
    return pool


class TestSlots:
    def test_slots_are_whole_units_side_by_side_from_the_start_of_each_extent(self) -> None:
        pool = pool_of(3 * 4096 - 1, 0, 2)
        assert pool.num_slots == pool.num_free == 6
        assert sorted(pool.take(99)) == [0, 3, 6, 20, 23, 26]
        assert (pool.num_free, pool.take(1)) == (0, [])

    def test_what_is_given_back_can_be_taken_again(self) -> None:
        pool = pool_of(4096, 1)
        slots = pool.take(10)
        for slot in slots[2:5]:
            pool.give_back(slot)
        assert pool.num_free == 3
        assert sorted(pool.take(9)) == slots[2:5]

    def test_a_slot_can_be_taken_by_its_number_once(self) -> None:
        pool = pool_of(8192, 1)
        assert pool.take_this(14)
        assert not pool.take_this(14)
        assert sorted(pool.take(9)) == [10, 12, 16, 18]
        assert not pool.take_this(12)

    @pytest.mark.parametrize("slot", [0, 11, 20, 9])
    def test_what_is_no_slot_of_ours_is_refused(self, slot: int) -> None:
        with pytest.raises(ValueError, match=f"{slot}"):
            pool_of(8192, 1).take_this(slot)

    def test_the_rest_behind_the_last_slot_is_no_slot(self) -> None:
        pool = pool_of(3 * 4096, 0)
        with pytest.raises(ValueError, match="begins at 9"):
            pool.take_this(9)
        assert pool.block_at(9) is None


class TestExtentTable:
    def test_every_extent_is_handed_out_once(self) -> None:
        journal = FakeJournal(10)
        table = ExtentTable(3 * EXTENT_BYTES + 4096, EXTENT_BYTES, journal, FakeClock())
        assert [table.assign(0, 4096) for _ in range(4)] == [0, 1, 2, None]
        assert journal.num_asked == 3
        table.give_back(1, 0)
        assert table.num_unassigned == 1
        assert table.assign(5, 8192) == 1
        assert journal.extents[1] == (5, 8192)

    def test_a_system_without_memory_is_asked_once_a_minute(self) -> None:
        journal, clock = FakeJournal(10), FakeClock()
        table = ExtentTable(3 * EXTENT_BYTES, EXTENT_BYTES, journal, clock)
        assert table.assign(0, 4096) == 0
        journal.has_memory = False
        assert [table.assign(0, 4096) for _ in range(3)] == [None] * 3
        assert journal.num_asked == 2
        assert (table.num_unassigned, table.num_obtainable) == (0, 1)
        clock.now_s += 60
        assert (table.num_unassigned, table.num_obtainable) == (2, 3)
        journal.has_memory = True
        assert {table.assign(0, 4096) for _ in range(3)} == {1, 2, None}

    def test_an_extent_that_has_its_memory_is_had_although_the_system_has_none(self) -> None:
        journal = FakeJournal(10)
        table = ExtentTable(3 * EXTENT_BYTES, EXTENT_BYTES, journal, FakeClock())
        table.assign(0, 4096)
        journal.has_memory = False
        assert table.assign(0, 4096) is None
        table.give_back(0, 0)
        assert table.assign(1, 4096) == 0

    @pytest.mark.parametrize(("arena", "extent"), [(4096, 8192), (8192, 0), (8192, 100)])
    def test_an_arena_that_cannot_be_cut_says_which_setting_to_raise(
        self, arena: int, extent: int
    ) -> None:
        with pytest.raises(ConfigError, match=r"raise cache\.host\.bytes"):
            ExtentTable(arena, extent, FakeJournal(1), FakeClock())

    def test_an_extent_is_adopted_once(self) -> None:
        table = ExtentTable(2 * EXTENT_BYTES, EXTENT_BYTES, FakeJournal(10), FakeClock())
        table.adopt(1)
        for number in (1, 2):
            with pytest.raises(ValueError, match=f"extent {number}"):
                table.adopt(number)
        assert [table.assign(0, 4096) for _ in range(2)] == [0, None]


def run_of(num_blocks: int, first_token: int = 0) -> NewRun:
    chain = chain_of(num_blocks, first_token)
    return NewRun(chain.parent_of(0), tuple(chain.hashes))


class TestShares:
    """Two namespaces, `OLD` with blocks in all four extents, and `NEW`, which has none yet.

    Holder 1 uses the old one, holder 2 the new one.
    """

    OLD, NEW = 0, 1

    def start(self, *, leased: bool = False) -> tuple[HostIndex, FakeJournal, FakeClock]:
        journal, clock = FakeJournal(4), FakeClock()
        index = make_index(IndexRules(lambda clock: LruPolicy()), journal, clock, 4)
        for holder, (name, block_bytes) in enumerate([("old", 4096), ("new", 8192)], start=1):
            index.attach(holder, index.open_namespace(name, block_bytes))
        for number in range(4):
            grant = put(index, 1, self.OLD, run_of(4, 100 * number))
            if not leased:
                index.release(1, grant.slots)
        return index, journal, clock

    def num_extents(self, journal: FakeJournal, namespace: int) -> int:
        return sum(owner == namespace for owner, _ in journal.extents.values())

    def test_who_has_less_than_its_share_takes_the_coldest_extents(self) -> None:
        index, journal, _ = self.start()
        index.release(1, index.lease(1, self.OLD, run_of(4).hashes, 0).slots)
        assert len(reserve_all(index, 2, self.NEW, 99)) == 4
        assert self.num_extents(journal, self.NEW) == 2
        names = {used.record.block_hash for used in journal.used.values()}
        assert names == {*run_of(4).hashes, *run_of(4, 300).hashes}
        assert index.stats(self.OLD).evicted_blocks == 8

    def test_who_has_its_share_evicts_its_own(self) -> None:
        index, journal, _ = self.start()
        index.release(2, put(index, 2, self.NEW, run_of(4)).slots)
        assert len(index.reserve(2, self.NEW, 3)) == 3
        assert index.stats(self.NEW).evicted_blocks == 3
        assert self.num_extents(journal, self.OLD) == 2
        assert len(reserve_all(index, 1, self.OLD, 99)) == 8

    def test_shares_leave_nobody_with_less_for_the_odd_extent(self) -> None:
        journal = FakeJournal(2)
        index = make_index(IndexRules(lambda clock: LruPolicy()), journal, FakeClock(), 5)
        for holder, name in enumerate(("old", "new"), start=1):
            index.attach(holder, index.open_namespace(name, 4096))
        index.release(1, put(index, 1, self.OLD, run_of(10)).slots)
        for number in range(4):
            index.release(2, put(index, 2, self.NEW, run_of(2, 100 * number)).slots)
        assert self.num_extents(journal, self.OLD) == 3

    def test_nobody_gives_what_is_within_its_share(self) -> None:
        index, journal, _ = self.start()
        assert len(index.reserve(2, self.NEW, 1)) == 1
        idle = index.open_namespace("idle", 4096)
        index.attach(3, idle)
        put(index, 3, idle, run_of(1))
        index.pin(idle, run_of(1).hashes, 100)
        index.detach(3)
        assert len(reserve_all(index, 2, self.NEW, 9)) == 1
        assert self.num_extents(journal, self.OLD) == 2

    def test_who_is_idle_has_no_share(self) -> None:
        index, journal, _ = self.start()
        index.detach(1)
        assert len(reserve_all(index, 2, self.NEW, 99)) == 8
        assert self.num_extents(journal, self.NEW) == 4
        assert index.stats(self.OLD).num_slots == 0

    def test_an_extent_in_use_is_not_taken_and_looked_for_again_a_second_later(self) -> None:
        index, journal, clock = self.start(leased=True)
        assert index.reserve(2, self.NEW, 1) == ()
        index.release(1, sorted(journal.used)[4:8])
        assert index.reserve(2, self.NEW, 1) == ()
        clock.now_s += 1
        assert len(reserve_all(index, 2, self.NEW, 99)) == 2
        assert self.num_extents(journal, self.NEW) == 1

    @pytest.mark.parametrize("use", ["reserve", "pin"])
    def test_one_slot_in_use_keeps_its_extent(self, use: str) -> None:
        index, journal, _ = self.start()
        kept = run_of(4).hashes
        if use == "pin":
            index.pin(self.OLD, kept[:1], 100)
        else:
            index.drop(self.OLD, kept[3:])
            assert len(index.reserve(1, self.OLD, 1)) == 1
        assert len(reserve_all(index, 2, self.NEW, 99)) == 4
        assert kept[0] in {used.record.block_hash for used in journal.used.values()}
        assert self.num_extents(journal, self.OLD) == 2

    def test_an_extent_that_became_empty_goes_to_who_needs_it_beyond_its_share(self) -> None:
        index, journal, clock = self.start()
        assert len(reserve_all(index, 2, self.NEW, 99)) == 4
        left = [used.record.block_hash for used in journal.used.values()]
        assert index.drop(self.OLD, left[:4]) == 4  # they lay in one extent
        clock.now_s += 1
        assert len(reserve_all(index, 2, self.NEW, 99)) == 2
        assert self.num_extents(journal, self.OLD) == 1

    def test_a_request_waits_for_one_extent_at_most_and_evicts_nothing_for_the_rest(self) -> None:
        journal = FakeJournal(4)
        index = make_index(IndexRules(lambda clock: LruPolicy()), journal, FakeClock(), 4)
        index.attach(1, index.open_namespace("old", 4096))
        index.release(1, put(index, 1, 0, run_of(4)).slots)
        for num_extents in (2, 3, 4):
            assert len(index.reserve(1, 0, 99)) == 4
            assert len(journal.extents) == num_extents
        assert index.stats(0).evicted_blocks == 0
        assert len(index.reserve(1, 0, 99)) == 4
        assert index.stats(0).evicted_blocks == 4

    def test_a_namespace_without_one_slot_is_told_of_once(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        index, _, clock = self.start(leased=True)
        for _ in range(3):
            assert index.reserve(2, self.NEW, 1) == ()
            clock.now_s += 1
        (record,) = caplog.records
        assert "namespace new" in record.getMessage()
        assert "raise cache.host.bytes" in record.getMessage()

    def test_free_memory_is_taken_before_anything_is_evicted(self) -> None:
        journal, clock = FakeJournal(4), FakeClock()
        index = make_index(IndexRules(lambda clock: LruPolicy()), journal, clock, 4)
        index.attach(1, index.open_namespace("old", 4096))
        for number in range(4):
            index.release(1, put(index, 1, 0, run_of(4, 100 * number)).slots)
        assert index.stats(0).evicted_blocks == 0
        assert index.stats(0).used_slots == 16

    def test_without_memory_a_namespace_lives_on_what_it_has(self) -> None:
        journal, clock = FakeJournal(4), FakeClock()
        index = make_index(IndexRules(lambda clock: LruPolicy()), journal, clock, 4)
        index.attach(1, index.open_namespace("old", 4096))
        index.release(1, put(index, 1, 0, run_of(4)).slots)
        journal.has_memory = False
        assert len(index.reserve(1, 0, 6)) == 4
        assert index.stats(0).num_slots == 4

    def test_without_memory_a_share_is_one_of_what_there_is(self) -> None:
        journal, clock = FakeJournal(4), FakeClock()
        index = make_index(IndexRules(lambda clock: LruPolicy()), journal, clock, 100)
        index.attach(1, index.open_namespace("old", 4096))
        for number in range(2):
            index.release(1, put(index, 1, 0, run_of(4, 100 * number)).slots)
        journal.has_memory = False
        index.cancel(1, index.reserve(1, 0, 9))  # asks for a third extent, in vain
        index.release(1, put(index, 1, 0, run_of(8)).slots)
        index.attach(2, index.open_namespace("new", 4096))
        assert len(index.reserve(2, 1, 99)) == 4

    def test_a_block_larger_than_an_extent_is_refused_at_once(self) -> None:
        index = make_index(IndexRules(lambda clock: LruPolicy()), FakeJournal(4), FakeClock(), 4)
        with pytest.raises(ConfigError, match=r"takes 20480 bytes.*extents of 16384"):
            index.open_namespace("large", 16385)


def test_names_of_one_namespace_mean_nothing_in_another() -> None:
    journal = FakeJournal(4)
    index = make_index(IndexRules(lambda clock: LruPolicy()), journal, FakeClock(), 2)
    for name in ("a", "b"):
        index.attach(1, index.open_namespace(name, 4096))
    run = run_of(2)
    put(index, 1, 0, run)
    assert index.lease(1, 1, run.hashes, 0).slots == ()
    put(index, 1, 1, run)
    names: list[BlockHash] = [used.record.block_hash for used in journal.used.values()]
    assert sorted(names) == sorted(run.hashes * 2)
