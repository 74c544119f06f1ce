"""The device tier's bookkeeping against a plain model of it."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from actors.engines.torch import slots as slots_module
from actors.engines.torch.slots import SlotPool
from shared_cache.hashing import BlockHash, block_hashes

NUM_SLOTS = 6
CHAIN = [BlockHash(bytes([i]) * 32) for i in range(8)]


class SlotPoolMachine(RuleBasedStateMachine):
    """Holders take and give back slots; `refs` and `content` are what must be true of each."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(NUM_SLOTS)
        self.refs = [0] * NUM_SLOTS
        self.content: dict[int, BlockHash] = {}

    @rule(target=held, num_slots=st.integers(0, NUM_SLOTS))
    def allocate(self, num_slots: int):
        if num_slots > self.refs.count(0):
            with pytest.raises(ValueError, match="available"):
                self.pool.allocate(num_slots)
            return multiple()
        slots = self.pool.allocate(num_slots)
        assert len(set(slots)) == num_slots
        for slot in slots:
            assert self.refs[slot] == 0, "a referenced slot was handed out"
            self.refs[slot] = 1
            self.content.pop(slot, None)
        return slots

    @rule(target=held, start=st.integers(0, 7), count=st.integers(0, 8))
    def acquire(self, start: int, count: int):
        hashes = CHAIN[start : start + count]
        num_matched = self.pool.match(hashes)
        matched = hashes[:num_matched]
        assert all(h in self.content.values() for h in matched)
        assert num_matched == len(hashes) or hashes[num_matched] not in self.content.values()
        num_before = self.pool.num_available
        num_idle = self.pool.num_idle(matched)
        slots = self.pool.acquire(matched)
        assert self.pool.num_available == num_before - num_idle
        assert [self.content[slot] for slot in slots] == matched
        for slot in slots:
            self.refs[slot] += 1
        return slots

    @rule(slots=held, index=st.integers(0, NUM_SLOTS - 1), block_hash=st.sampled_from(CHAIN))
    def publish(self, slots: list[int], index: int, block_hash: BlockHash) -> None:
        if not slots:
            return
        slot = slots[index % len(slots)]
        self.pool.publish(slot, block_hash)
        if slot not in self.content and block_hash not in self.content.values():
            self.content[slot] = block_hash

    @rule(slots=consumes(held))
    def release(self, slots: list[int]) -> None:
        self.pool.release(slots)
        for slot in slots:
            self.refs[slot] -= 1

    @invariant()
    def every_slot_is_counted_once(self) -> None:
        assert self.pool.num_available == self.refs.count(0)
        assert self.pool.num_referenced == NUM_SLOTS - self.refs.count(0)

    @invariant()
    def what_is_offered_is_what_was_published(self) -> None:
        for block_hash in CHAIN:
            assert (self.pool.match([block_hash]) == 1) == (block_hash in self.content.values())


TestSlotPool = SlotPoolMachine.TestCase


def test_the_end_of_a_chain_is_evicted_before_its_beginning() -> None:
    pool = SlotPool(4)
    hashes = block_hashes(range(16), 4)
    slots = pool.allocate(4)
    for slot, block_hash in zip(slots, hashes, strict=True):
        pool.publish(slot, block_hash)
    pool.release(slots)
    pool.allocate(3)
    assert pool.match(hashes) == 1


def test_the_least_recently_released_block_is_evicted_first() -> None:
    pool = SlotPool(2)
    old, new = pool.allocate(2)
    pool.publish(old, CHAIN[0])
    pool.publish(new, CHAIN[1])
    pool.release([old])
    pool.release([new])
    pool.release(pool.acquire([CHAIN[0]]))  # used again: now the other one is the oldest
    pool.allocate(1)
    assert pool.match([CHAIN[0]]) == 1
    assert pool.match([CHAIN[1]]) == 0


def test_faults_of_the_caller_are_refused() -> None:
    pool = SlotPool(2)
    (slot,) = pool.allocate(1)
    pool.release([slot])
    with pytest.raises(ValueError, match="more often"):
        pool.release([slot])
    with pytest.raises(ValueError, match="not in use"):
        pool.publish(slot, CHAIN[0])


def test_what_changed_is_told_once_and_all_of_it_when_too_much_was_not_taken(monkeypatch):
    monkeypatch.setattr(slots_module, "MAX_KEPT_CHANGES", 4)
    pool = SlotPool(2)

    def publish(name: bytes) -> None:
        (slot,) = pool.allocate(1)
        pool.publish(slot, name)
        pool.release([slot])

    publish(b"a")
    publish(b"b")
    assert set(pool.take_changes().stored) == {b"a", b"b"}
    assert not pool.take_changes()
    publish(b"c")  # evicts a
    publish(b"d")  # evicts b
    changes = pool.take_changes()
    assert (set(changes.stored), set(changes.removed)) == ({b"c", b"d"}, {b"a", b"b"})
    publish(b"e")  # evicts c
    publish(b"c")  # evicts d
    changes = pool.take_changes()
    assert (set(changes.stored), set(changes.removed)) == ({b"e", b"c"}, {b"d"})
    for name in (b"f", b"g", b"h", b"i"):
        publish(name)
    changes = pool.take_changes()
    assert (set(changes.stored), changes.is_cleared) == ({b"h", b"i"}, True)
    assert not pool.take_changes()
