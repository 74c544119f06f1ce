"""A restarted owner: what its records say is here again, and nothing goes that may be in use."""

from dataclasses import replace

import pytest

from shared_cache.eviction import LruPolicy
from shared_cache.hashing import BlockHash, ReuseScope
from shared_cache.host.index import BlockRecord, HostIndex, IndexRules, StoreAdmission
from shared_cache.host.interface import NewRun
from tests.shared_cache.arena_fakes import FakeJournal, make_index, put, reserve_all
from tests.shared_cache.fakes import FakeClock, chain_of

CHAIN = chain_of(4)
RUN = NewRun(CHAIN.parent_of(0), tuple(CHAIN.hashes))
SALT = ReuseScope(cache_salt="limited")


def rules(admission: StoreAdmission = "always", quota_blocks: int = 99) -> IndexRules:
    return IndexRules(lambda clock: LruPolicy(), {SALT.tenant: quota_blocks * 4096}, admission)


def open_index(journal: FakeJournal, given: IndexRules | None = None) -> HostIndex:
    index = make_index(given or rules(), journal, FakeClock(), 2)
    index.open_namespace("n", 4096)
    return index


def restarted(
    journal: FakeJournal | None = None, given: IndexRules | None = None
) -> tuple[HostIndex, FakeJournal]:
    """An index after a restart, of an arena of 8 slots with the 4 blocks of `RUN`."""
    if journal is None:
        journal = FakeJournal(4)
        before = open_index(journal)
        before.attach(1, 0)
        before.release(1, put(before, 1, 0, RUN).slots)
    index = open_index(journal, given)
    journal.replay(index)
    return index, journal


def slot_of(journal: FakeJournal, block_hash: BlockHash) -> int:
    return next(s for s, u in journal.used.items() if u.record.block_hash == block_hash)


def test_adopted_blocks_are_where_they_were_and_stay_until_the_thaw() -> None:
    index, journal = restarted()
    index.attach(2, 0)
    grant = index.lease(2, 0, RUN.hashes, 0)
    assert grant.slots == tuple(slot_of(journal, block_hash) for block_hash in RUN.hashes)
    assert grant.num_from_peers == 0  # nobody knows
    index.release(2, grant.slots)
    assert len(index.reserve(2, 0, 8)) == 4
    assert index.drop(0, RUN.hashes) == 0
    index.thaw()
    assert len(index.reserve(2, 0, 8)) == 4
    assert index.stats(0).evicted_blocks == 4


def test_a_holder_that_came_back_has_its_leases_again() -> None:
    index, journal = restarted()
    first, second = (slot_of(journal, block_hash) for block_hash in RUN.hashes[:2])
    assert index.adopt_lease(7, 0, [first, second, first, 6, 999]) == (first, second, first)
    index.thaw()
    index.attach(7, 0)
    index.release(7, [first, second])
    assert len(reserve_all(index, 7, 0, 8)) == 7
    index.release(7, [first])
    assert len(index.reserve(7, 0, 8)) == 1


def test_what_is_being_written_stays_reserved_for_its_writer() -> None:
    journal = FakeJournal(4)
    before = open_index(journal)
    before.attach(5, 0)
    slots = before.reserve(5, 0, 2)
    index, _ = restarted(journal)
    index.attach(5, 0)
    assert index.stats(0).reserved_slots == 2
    with pytest.raises(ValueError, match="taken already"):
        index.adopt_reserved(slots[0], 6)
    with pytest.raises(ValueError, match="no adopted extent"):
        index.adopt_reserved(7, 6)
    run = replace(RUN, hashes=RUN.hashes[:2], checksums=(1, 2))
    assert index.commit(5, 0, slots, run).slots == slots


def test_a_slot_and_a_block_are_adopted_once() -> None:
    index, journal = restarted()
    here = slot_of(journal, RUN.hashes[0])
    other = chain_of(1, first_token=500)
    record = BlockRecord(other.hashes[0], other.parent_of(0), b"", False)
    assert not index.adopt(0, here, record)
    free = next(iter(journal.slots_of(0) - journal.taken), None)
    assert free is None
    index.adopt_extent(1, 0)
    known = BlockRecord(RUN.hashes[0], RUN.parent, b"", False)
    assert not index.adopt(0, 5, known)
    assert index.adopt(0, 5, record)
    with pytest.raises(ValueError, match="slot 8"):
        index.adopt(0, 8, replace(record, block_hash=RUN.parent))
    assert index.stats(0).used_slots == 5


@pytest.mark.parametrize("admission", ["always", "second_use", "never"])
def test_what_was_not_stored_is_named_at_its_next_use(admission: StoreAdmission) -> None:
    journal = FakeJournal(4)
    before = open_index(journal)
    before.attach(1, 0)
    put(before, 1, 0, RUN)
    before.stored(1, 0, RUN.hashes[:1], True)
    index, _ = restarted(journal, rules(admission))
    index.attach(1, 0)
    expected = () if admission == "never" else (1, 2, 3)
    assert index.lease(1, 0, RUN.hashes, 0).to_store == expected


def test_parents_are_known_whatever_the_order_of_the_slots() -> None:
    journal = FakeJournal(4)
    before = open_index(journal)
    before.attach(1, 0)
    for position in (2, 0, 3, 1):  # as pieces of one chain arrive
        part = NewRun(CHAIN.parent_of(position), RUN.hashes[position : position + 1])
        before.release(1, put(before, 1, 0, part).slots)
    index, _ = restarted(journal)
    index.attach(1, 0)
    index.thaw()
    for num_left in (3, 2, 1, 0):
        reserve_all(index, 1, 0, 5 if num_left == 3 else 1)
        names = {used.record.block_hash for used in journal.used.values()}
        assert names == set(RUN.hashes[:num_left])


def test_a_quota_that_shrank_holds_from_the_thaw_on() -> None:
    run = NewRun(RUN.parent, RUN.hashes, SALT.tenant)
    journal = FakeJournal(4)
    before = open_index(journal)
    before.attach(1, 0)
    before.release(1, put(before, 1, 0, run).slots)
    index, _ = restarted(journal, rules(quota_blocks=3))
    assert index.stats(0).used_slots == 4
    index.thaw()
    assert {used.record.block_hash for used in journal.used.values()} == set(RUN.hashes[:3])


def test_new_blocks_make_room_while_old_ones_are_frozen() -> None:
    index, _ = restarted()
    index.attach(1, 0)
    new = chain_of(4, first_token=500)
    run = NewRun(new.parent_of(0), tuple(new.hashes))
    index.release(1, put(index, 1, 0, run).slots)
    assert len(index.reserve(1, 0, 8)) == 4
    assert index.lease(1, 0, RUN.hashes, 0).slots
