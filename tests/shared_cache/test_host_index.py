"""Every order of host tier events against a plain model of what must hold."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shared_cache.eviction import LruPolicy
from shared_cache.hashing import BlockHash
from shared_cache.host.index import HostIndex
from shared_cache.host.interface import HostLease
from tests.shared_cache.fakes import BLOCK_BYTES, chain_of

NUM_SLOTS = 6
CHAINS = [chain_of(5).hashes, chain_of(5, first_token=1000).hashes]


def make_index(num_slots: int = NUM_SLOTS) -> HostIndex:
    return HostIndex(num_slots, BLOCK_BYTES, LruPolicy())


class HostIndexMachine(RuleBasedStateMachine):
    """The model: what was written into each slot, who holds which lease, which slots are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.index = make_index()
        self.reserved: list[int] = []
        self.written: dict[int, BlockHash] = {}
        self.leases: list[tuple[HostLease, list[BlockHash]]] = []

    @rule(num_slots=st.integers(0, NUM_SLOTS + 1))
    def reserve(self, num_slots: int) -> None:
        before = self.index.stats()
        slots = self.index.reserve(num_slots)
        available = before.num_slots - before.reserved_slots - before.leased_slots
        assert len(slots) == min(num_slots, available)
        assert not set(slots) & set(self.reserved)
        assert not set(slots) & {slot for lease, _ in self.leases for slot in lease.slots}
        self.reserved += slots

    @rule(chain=st.sampled_from(CHAINS), start=st.integers(0, 4), length=st.integers(0, 5))
    def commit(self, chain: list[BlockHash], start: int, length: int) -> None:
        hashes = chain[start : start + min(length, len(self.reserved))]
        slots, self.reserved = self.reserved[: len(hashes)], self.reserved[len(hashes) :]
        present = [self.index.match([h]) for h in hashes]
        lease = self.index.commit(slots, hashes)
        assert len(lease.slots) == len(hashes)
        for slot, held, block_hash, was_there in zip(
            slots, lease.slots, hashes, present, strict=True
        ):
            if was_there:
                assert self.written[held] == block_hash
            else:
                assert held == slot
                self.written[slot] = block_hash
        self.leases.append((lease, list(hashes)))

    @rule(num_slots=st.integers(0, NUM_SLOTS))
    def cancel(self, num_slots: int) -> None:
        cancelled, self.reserved = self.reserved[:num_slots], self.reserved[num_slots:]
        self.index.cancel(cancelled)

    @rule(chain=st.sampled_from(CHAINS), length=st.integers(0, 5))
    def lease(self, chain: list[BlockHash], length: int) -> None:
        num_present = self.index.match(chain[:length])
        lease = self.index.lease(chain[:length])
        assert len(lease.slots) == num_present
        self.leases.append((lease, chain[:num_present]))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.leases:
            position = data.draw(st.integers(0, len(self.leases) - 1))
            lease, _ = self.leases.pop(position)
            self.index.release(lease)
            self.index.release(lease)

    @invariant()
    def every_slot_is_counted_once(self) -> None:
        stats = self.index.stats()
        assert stats.free_slots + stats.used_slots + stats.reserved_slots == NUM_SLOTS
        assert stats.reserved_slots == len(self.reserved)

    @invariant()
    def leased_blocks_stay_where_they_are(self) -> None:
        leased = set()
        for lease, hashes in self.leases:
            for slot, block_hash in zip(lease.slots, hashes, strict=True):
                assert self.index.match([block_hash]) == 1
                assert self.written[slot] == block_hash
                leased.add(block_hash)
        assert self.index.stats().leased_slots == len(leased)


HostIndexMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None
)
TestHostIndex = HostIndexMachine.TestCase


def test_match_counts_leading_blocks_only() -> None:
    index, hashes = make_index(), CHAINS[0]
    index.commit(index.reserve(2), [hashes[0], hashes[2]])
    assert index.match(hashes) == 1
    assert index.match(hashes[2:]) == 1


def test_eviction_takes_the_least_recently_leased_and_counts() -> None:
    index = make_index(4)
    for chain in CHAINS:
        index.release(index.commit(index.reserve(2), chain[:2]))
    index.release(index.lease(CHAINS[0][:2]))
    assert len(index.reserve(2)) == 2
    assert (index.match(CHAINS[0]), index.match(CHAINS[1])) == (2, 0)
    assert index.stats().evicted_blocks == 2


def test_a_full_house_of_leases_gives_nothing() -> None:
    index = make_index(2)
    lease = index.commit(index.reserve(2), CHAINS[0][:2])
    assert index.reserve(1) == ()
    index.release(lease)
    assert len(index.reserve(1)) == 1


@pytest.mark.parametrize("slots", [(5,), (0, 0)])
def test_slots_that_are_not_reserved_are_refused_and_nothing_changes(
    slots: tuple[int, ...],
) -> None:
    index = make_index()
    assert index.reserve(1) == (0,)
    before = index.stats()
    with pytest.raises(ValueError, match="not reserved"):
        index.cancel(slots)
    with pytest.raises(ValueError, match="not reserved"):
        index.commit(slots, CHAINS[0][: len(slots)])
    assert index.stats() == before


def test_slots_and_hashes_must_agree() -> None:
    index = make_index()
    with pytest.raises(ValueError, match="1 slots but 2 hashes"):
        index.commit(index.reserve(1), CHAINS[0][:2])
