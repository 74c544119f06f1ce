"""The host tier's bookkeeping: which slot holds which block, who leases it, what goes next.

It moves no bytes, so every order of events can be tested. What it prevents: a slot handed out
twice, a leased block evicted under its reader, a half-written block found by a match.

Every slot is in exactly one state:

    free -> reserved (being written) -> used (published; leased by any number of readers) -> free
"""

from collections.abc import Sequence
from itertools import count, takewhile

from shared_cache.eviction import EvictionPolicy
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import HostLease, HostStats

EMPTY_LEASE = HostLease(0, ())


class HostIndex:
    """Slots, reservations and leases of one host tier. Not thread-safe: its tier holds a lock.

    Breaking the protocol (committing a slot that is not reserved) raises `ValueError` and changes
    nothing.
    """

    def __init__(self, num_slots: int, block_bytes: int, policy: EvictionPolicy) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, not {num_slots}")
        self._num_slots = num_slots
        self._block_bytes = block_bytes
        self._policy = policy
        self._free = list(range(num_slots - 1, -1, -1))
        self._reserved: set[int] = set()
        self._slot_of: dict[BlockHash, int] = {}
        self._num_leases_of: dict[BlockHash, int] = {}
        self._leases: dict[int, Sequence[BlockHash]] = {}
        self._lease_ids = count(1)
        self._evicted_blocks = 0

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks are present; does not count as an access."""
        return sum(1 for _ in takewhile(self._slot_of.__contains__, hashes))

    def lease(self, hashes: Sequence[BlockHash]) -> HostLease:
        """Lease the leading blocks that are present; counts as an access."""
        present = hashes[: self.match(hashes)]
        if not present:
            return EMPTY_LEASE
        self._policy.accessed(present)
        return self._grant(present)

    def release(self, lease: HostLease) -> None:
        """End a lease; one that has ended already is a no-op."""
        for block_hash in self._leases.pop(lease.lease_id, ()):
            remaining = self._num_leases_of[block_hash] - 1
            if remaining:
                self._num_leases_of[block_hash] = remaining
            else:
                del self._num_leases_of[block_hash]

    def reserve(self, num_slots: int) -> tuple[int, ...]:
        """Up to `num_slots` slots to write into; evicts unleased blocks when too few are free."""
        missing = num_slots - len(self._free)
        if missing > 0:
            for victim in self._policy.victims(missing, self._may_evict):
                self._policy.removed(victim)
                self._free.append(self._slot_of.pop(victim))
                self._evicted_blocks += 1
        slots = tuple(self._free.pop() for _ in range(min(num_slots, len(self._free))))
        self._reserved.update(slots)
        return slots

    def commit(self, slots: Sequence[int], hashes: Sequence[BlockHash]) -> HostLease:
        """Publish reserved slots under their hashes and lease them in one step.

        A block that is present already keeps its old slot; the new one becomes free.
        """
        if len(slots) != len(hashes):
            raise ValueError(f"{len(slots)} slots but {len(hashes)} hashes")
        if not slots:
            return EMPTY_LEASE
        self._take_reserved(slots)
        inserted = []
        for slot, block_hash in zip(slots, hashes, strict=True):
            if block_hash in self._slot_of:
                self._free.append(slot)
            else:
                self._slot_of[block_hash] = slot
                inserted.append(block_hash)
        self._policy.inserted(inserted)
        self._policy.accessed(hashes)
        return self._grant(hashes)

    def cancel(self, slots: Sequence[int]) -> None:
        """Give reserved slots back unwritten."""
        self._take_reserved(slots)
        self._free.extend(slots)

    def stats(self) -> HostStats:
        """The counts; `free + used + reserved == num_slots`."""
        return HostStats(
            num_slots=self._num_slots,
            free_slots=len(self._free),
            used_slots=len(self._slot_of),
            reserved_slots=len(self._reserved),
            leased_slots=len(self._num_leases_of),
            evicted_blocks=self._evicted_blocks,
            block_bytes=self._block_bytes,
        )

    def _may_evict(self, block_hash: BlockHash) -> bool:
        return block_hash not in self._num_leases_of

    def _take_reserved(self, slots: Sequence[int]) -> None:
        if len(set(slots)) != len(slots) or not self._reserved.issuperset(slots):
            raise ValueError(f"not reserved, or named twice: slots {list(slots)}")
        self._reserved.difference_update(slots)

    def _grant(self, hashes: Sequence[BlockHash]) -> HostLease:
        lease = HostLease(next(self._lease_ids), tuple(self._slot_of[h] for h in hashes))
        self._leases[lease.lease_id] = tuple(hashes)
        for block_hash in hashes:
            self._num_leases_of[block_hash] = self._num_leases_of.get(block_hash, 0) + 1
        return lease
