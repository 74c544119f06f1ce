"""What the index decides, one rule at a time: who reads, who writes, who stores."""

from dataclasses import replace

import pytest

from shared_cache.host.index import Grant, HostIndex, IndexRules
from shared_cache.host.turns import RECENT_S, RECHECK_STORED_S
from tests.shared_cache.arena_fakes import HASHES, A, Arena, B, FakeJournal, lru, run_of
from tests.shared_cache.fakes import FakeClock


def test_a_lease_is_on_the_leading_blocks_behind_first() -> None:
    arena = Arena()
    arena.put_idle(run_of(stop=5))
    arena.index.drop(0, [HASHES[1]])
    slots = [slot for slot, used in arena.journal.used.items()]
    assert arena.index.lease(A, 0, HASHES, 0).slots == tuple(slots[:1])
    assert arena.index.lease(A, 0, HASHES, 1).slots == ()
    assert arena.index.lease(A, 0, HASHES, 2).slots == tuple(slots[1:])


def test_blocks_before_first_count_as_asked_for_also_behind_a_gap() -> None:
    arena = Arena(num_slots=6)
    arena.put_idle(run_of(stop=3))
    arena.put_idle(run_of(stop=3, first_token=500))
    arena.index.drop(0, [HASHES[1]])
    arena.index.lease(A, 0, HASHES[:3], 3)  # the other run is the one to go now
    arena.index.reserve(A, 0, 4)
    assert arena.names == {HASHES[0], HASHES[2]}


def test_what_another_holder_brought_comes_from_a_peer() -> None:
    arena = Arena()
    arena.put(A, run_of(stop=2))
    arena.put(B, run_of(2, 5))
    assert arena.index.lease(A, 0, HASHES, 0).num_from_peers == 3
    assert arena.index.lease(B, 0, HASHES, 0).num_from_peers == 2
    assert arena.index.stats(0).peer_blocks == 5


def test_a_holder_ends_its_own_leases_one_by_one_and_no_others() -> None:
    arena = Arena()
    slots = arena.put(A, run_of(stop=2)).slots
    arena.index.lease(A, 0, HASHES, 0)
    arena.index.lease(B, 0, HASHES, 0)
    arena.index.release(A, [*slots, 77])
    arena.index.release(B, [*slots, *slots])
    assert arena.index.stats(0).leased_slots == 2
    arena.index.release(A, slots[:1])
    assert arena.index.stats(0).leased_slots == 1
    assert len(arena.index.reserve(B, 0, 8)) == 6  # the first block has its child still
    arena.index.release(A, slots)
    assert len(arena.index.reserve(B, 0, 8)) == 2


def test_in_use_is_what_is_leased_or_was_asked_for_lately() -> None:
    arena = Arena()
    slots = arena.put(A, run_of(stop=4)).slots
    arena.index.release(A, slots[1:])
    assert arena.index.in_use(0, HASHES[:6]) == [0, 1, 2, 3]
    arena.clock.now_s += RECENT_S - 1
    assert arena.index.in_use(0, HASHES[:4]) == [0, 1, 2, 3]
    arena.clock.now_s += RECENT_S + 1
    arena.index.lease(B, 0, HASHES[:2], 2)
    assert arena.index.in_use(0, HASHES[:4]) == [0, 1]
    arena.clock.now_s += 3 * RECENT_S
    assert arena.index.in_use(0, [HASHES[5], *HASHES[:4]]) == [1]


class TestStoring:
    def test_what_is_stored_is_looked_up_again_when_that_is_long_ago(self) -> None:
        arena = Arena()
        arena.put_idle(replace(run_of(stop=2), is_stored=True))
        arena.clock.now_s += RECHECK_STORED_S / 2
        assert arena.index.lease(A, 0, HASHES, 0).to_store == ()
        arena.clock.now_s += 2 * RECHECK_STORED_S
        assert arena.index.lease(A, 0, HASHES, 0).to_store == (0, 1)
        assert arena.index.lease(B, 0, HASHES, 0).to_store == ()
        arena.index.stored(A, 0, HASHES[:1], True)  # it is there still
        arena.index.stored(A, 0, HASHES[1:2], False)  # no time to look
        assert arena.index.lease(B, 0, HASHES, 0).to_store == (1,)
        arena.index.stored(B, 0, HASHES[1:2], True)
        assert arena.index.lease(A, 0, HASHES, 0).to_store == ()

    def test_what_the_shared_tier_has_lost_is_stored_at_its_next_use(self) -> None:
        arena = Arena()
        arena.put_idle(replace(run_of(stop=3), is_stored=True))
        arena.index.stored(B, 0, [*HASHES[1:3], HASHES[7]], False)
        assert arena.index.lease(A, 0, HASHES, 0).to_store == (1, 2)
        arena.index.stored(A, 0, HASHES[1:3], True)
        assert arena.index.lease(A, 0, HASHES, 0).to_store == ()

    def test_nothing_is_looked_up_or_stored_where_nobody_writes(self) -> None:
        arena = Arena(admission="never")
        arena.put_idle(replace(run_of(stop=2), is_stored=True))
        arena.clock.now_s += 3 * RECHECK_STORED_S
        assert arena.index.lease(A, 0, HASHES, 0).to_store == ()
        arena.index.stored(A, 0, HASHES[:2], False)
        assert arena.index.lease(A, 0, HASHES, 0).to_store == ()

    def test_always_names_new_blocks_at_once_and_to_one_holder(self) -> None:
        arena = Arena()
        assert arena.put(A, run_of(stop=2)).to_store == (0, 1)
        assert arena.put(B, run_of(1, 3)).to_store == (1,)
        assert arena.index.lease(B, 0, HASHES, 0).to_store == ()

    def test_second_use_names_what_is_asked_for_after_it_was_brought(self) -> None:
        arena = Arena(admission="second_use")
        assert arena.put(A, run_of(stop=2)).to_store == ()
        assert arena.index.lease(B, 0, HASHES[:1], 0).to_store == (0,)
        assert arena.put(A, run_of(stop=3)).to_store == (1,)
        assert arena.index.claim(A, 0, HASHES[:3]).grant.to_store == (2,)
        assert arena.index.lease(A, 0, HASHES, 0).to_store == ()

    def test_a_use_before_first_names_nothing_as_it_gives_no_lease(self) -> None:
        arena = Arena(admission="second_use")
        arena.put(A, run_of(stop=2))
        for _ in range(2):
            assert arena.index.lease(A, 0, HASHES[:2], 2) == Grant(())
        assert arena.index.lease(A, 0, HASHES[:2], 1).to_store == (0,)

    def test_never_names_none(self) -> None:
        arena = Arena(admission="never")
        arena.put(A, run_of(stop=2))
        assert all(arena.index.lease(B, 0, HASHES, 0).to_store == () for _ in range(3))

    @pytest.mark.parametrize("how", ["told", "brought again"])
    def test_what_is_stored_is_noted_and_not_named_again(self, how: str) -> None:
        arena = Arena()
        if how == "told":
            arena.put(A, run_of(stop=2))
            arena.index.stored(A, 0, HASHES[:2], True)
        else:
            arena.put(A, run_of(stop=2))
            arena.put(B, replace(run_of(stop=2), is_stored=True))
        assert all(used.record.is_stored for used in arena.journal.used.values())
        arena.index.detach(A)
        assert arena.index.lease(B, 0, HASHES, 0).to_store == ()

    def test_what_was_given_up_is_named_again_at_its_next_use(self) -> None:
        arena = Arena()
        arena.put(A, run_of(stop=3))
        arena.index.stored(B, 0, HASHES[:1], False)  # it was never B's
        arena.index.stored(A, 0, HASHES[1:2], False)
        assert arena.index.lease(B, 0, HASHES, 0).to_store == (1,)
        arena.index.detach(A)
        assert arena.index.lease(B, 0, HASHES, 0).to_store == (0, 2)

    def test_a_block_that_went_and_came_back_is_nobodys_duty_any_more(self) -> None:
        arena = Arena()
        arena.put_idle(run_of(stop=1))
        arena.index.drop(0, HASHES[:1])
        assert arena.put(B, run_of(stop=1)).to_store == (0,)
        arena.index.stored(A, 0, HASHES[:1], False)
        assert arena.index.lease(A, 0, HASHES, 0).to_store == ()


class TestClaims:
    def test_each_block_is_claimed_once_and_the_next_one_is_coming(self) -> None:
        arena = Arena()
        arena.put(A, run_of(stop=2))
        first = arena.index.claim(A, 0, HASHES[:4])
        assert (len(first.grant.slots), len(first.slots), first.is_coming) == (2, 2, False)
        second = arena.index.claim(B, 0, HASHES)
        assert (len(second.grant.slots), second.slots, second.is_coming) == (2, (), True)
        assert arena.index.claim(A, 0, HASHES).is_coming

    def test_slots_end_before_what_is_coming_or_here(self) -> None:
        arena = Arena(num_slots=12)
        arena.index.claim(A, 0, HASHES[2:3])
        claim = arena.index.claim(B, 0, HASHES)
        assert (len(claim.slots), claim.is_coming) == (2, True)
        arena.put(A, run_of(4, 5))
        claim = arena.index.claim(B, 0, HASHES[3:])
        assert (len(claim.slots), claim.is_coming) == (1, False)

    @pytest.mark.parametrize("end", ["cancel", "detach", "commit"])
    def test_a_claim_ends_with_its_slot(self, end: str) -> None:
        arena = Arena()
        slots = arena.index.claim(A, 0, HASHES[:2]).slots
        if end == "cancel":
            arena.index.cancel(A, slots)
        elif end == "detach":
            arena.index.detach(A)
        else:  # under another name than it was claimed for
            arena.index.commit(A, 0, slots, replace(run_of(4, 6), checksums=(1, 2)))
        assert not arena.index.is_coming(0, HASHES[0])
        claim = arena.index.claim(B, 0, HASHES[:2])
        assert (len(claim.slots), claim.is_coming) == (2, False)

    def test_what_is_here_of_a_claim_does_not_make_room_for_the_rest(self) -> None:
        arena = Arena(num_slots=4)
        arena.put_idle(run_of(stop=3))
        claim = arena.index.claim(A, 0, HASHES)
        assert (len(claim.grant.slots), len(claim.slots), claim.is_coming) == (3, 1, False)


class TestProtocol:
    def test_slots_that_are_not_reserved_by_this_holder_are_refused_and_nothing_changes(
        self,
    ) -> None:
        arena = Arena()
        slots = arena.index.reserve(A, 0, 2)
        before, taken = arena.index.stats(0), dict(arena.journal.reserved_by)
        run = replace(run_of(stop=2), checksums=(1, 2))
        for holder, wrong in ((B, slots), (A, (slots[0], 9)), (A, (slots[0], slots[0]))):
            with pytest.raises(ValueError, match=r"not reserved|named twice"):
                arena.index.cancel(holder, wrong)
            with pytest.raises(ValueError, match=r"not reserved|named twice"):
                arena.index.commit(holder, 0, wrong, run)
        with pytest.raises(ValueError, match="2 slots, 2 hashes, 0 checksums"):
            arena.index.commit(A, 0, slots, run_of(stop=2))
        assert (arena.index.stats(0), arena.journal.reserved_by) == (before, taken)
        assert len(arena.index.commit(A, 0, slots, run).slots) == 2

    def test_a_slot_cannot_be_committed_into_another_namespace(self) -> None:
        arena = Arena(block_units=(1, 2))
        slots = arena.index.reserve(A, 0, 1)
        with pytest.raises(ValueError, match="not reserved"):
            arena.index.commit(A, 1, slots, replace(run_of(stop=1), checksums=(1,)))

    def test_strangers_are_refused(self) -> None:
        arena = Arena()
        with pytest.raises(ValueError, match="holder 3 is not attached"):
            arena.index.reserve(3, 0, 1)
        with pytest.raises(ValueError, match="namespace 1 was not opened"):
            arena.index.attach(A, 1)
        with pytest.raises(ValueError, match="blocks of namespace n0"):
            arena.index.open_namespace("n0", 8192)

    def test_damaged_blocks_go_unless_they_are_leased(self) -> None:
        arena = Arena()
        arena.put_idle(run_of(stop=3))
        arena.index.lease(A, 0, HASHES[:1], 0)
        assert arena.index.drop(0, [*HASHES, HASHES[1]]) == 2
        assert arena.names == {HASHES[0]}


def test_a_million_empty_slots_cost_nothing_until_they_are_used() -> None:
    index = HostIndex(1 << 36, 1 << 36, IndexRules(lru), FakeJournal(1 << 24), FakeClock())
    index.attach(A, index.open_namespace("n", 65536))
    assert index.stats(0).free_slots == 1 << 20
