"""A host tier that behaves like the node's: an owner that can be away, peers, held leases only.

It is the tier of one process with a second holder in its index, so peers do to it what another
process of the node would do. It notes which thread asked what an owner would have to be asked.
"""

import threading
from collections import Counter
from collections.abc import Sequence

from shared_cache.eviction import make_policy
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import HostClaim, HostLease, HostTier, NewRun
from shared_cache.host.local import LocalHostTier
from shared_cache.host.terms import IndexRules, StoreAdmission
from tests.shared_cache.fakes import BLOCK_BYTES, payload_of

NO_LEASE = HostLease(0, ())
PEER = 77


class ScriptedHost(LocalHostTier):
    """`is_away` makes every question an empty answer; `asked_by` are the threads that asked."""

    def __init__(self, num_slots: int = 64, admission: StoreAdmission = "always") -> None:
        rules = IndexRules(lambda clock: make_policy("lru", clock), {}, admission)
        super().__init__(num_slots * 4096, BLOCK_BYTES, rules)
        with self._changed:
            self._index.attach(PEER, self._namespace)
        self.is_away = False
        self.asked_by: Counter[str] = Counter()
        self.answers: list[tuple[tuple[BlockHash, ...], bool]] = []
        self.committed: list[NewRun] = []
        self._held: dict[int, tuple[BlockHash, ...]] = {}

    def lease(self, hashes: Sequence[BlockHash], first: int = 0) -> HostLease:
        self._asked()
        if self.is_away:
            return NO_LEASE
        return self._noted(super().lease(hashes, first), hashes[first:])

    def lease_held(self, hashes: Sequence[BlockHash]) -> HostLease:
        held = {block_hash for hashes in list(self._held.values()) for block_hash in hashes}
        num_held = next((i for i, h in enumerate(hashes) if h not in held), len(hashes))
        return self._noted(super().lease_held(hashes[:num_held]), hashes)

    def release(self, lease: HostLease) -> None:
        self._held.pop(lease.lease_id, None)
        super().release(lease)

    def claim(self, hashes: Sequence[BlockHash], wait_s: float = 0.0) -> HostClaim:
        self._asked()
        if self.is_away:
            return HostClaim(NO_LEASE, ())
        claim = super().claim(hashes, wait_s)
        self._noted(claim.lease, hashes)
        return claim

    def commit(self, slots: Sequence[int], run: NewRun) -> HostLease:
        self._asked()
        if self.is_away:
            super().cancel(slots)
            return NO_LEASE
        self.committed.append(run)
        return self._noted(super().commit(slots, run), run.hashes)

    def stored(self, hashes: Sequence[BlockHash], is_stored: bool) -> None:
        self._asked()
        if not self.is_away:
            self.answers.append((tuple(hashes), is_stored))
            super().stored(hashes, is_stored)

    def peer_claims(self, hashes: Sequence[BlockHash]) -> tuple[int, ...]:
        with self._changed:
            return self._index.claim(PEER, self._namespace, hashes).slots

    def peer_commits(self, slots: Sequence[int], run: NewRun, *, is_stored: bool = True) -> None:
        for slot, block_hash in zip(slots, run.hashes, strict=True):
            self.buffer(slot)[:] = payload_of(block_hash)
        checksums = tuple(_checksum(self, h, s) for h, s in zip(run.hashes, slots, strict=True))
        run = NewRun(run.parent, run.hashes, run.tenant, is_stored, checksums)
        with self._changed:
            grant = self._index.commit(PEER, self._namespace, slots, run)
            self._index.release(PEER, grant.slots)
            self._changed.notify_all()

    def peer_dies(self) -> None:
        with self._changed:
            self._index.detach(PEER)
            self._changed.notify_all()

    def damage(self, block_hash: BlockHash) -> None:
        """Flip a bit of a block that is here."""
        lease = super().lease([block_hash])
        self.buffer(lease.slots[0])[3] ^= 1
        super().release(lease)

    def _noted(self, lease: HostLease, hashes: Sequence[BlockHash]) -> HostLease:
        self._held[lease.lease_id] = tuple(hashes[: len(lease.slots)])
        return lease

    def _asked(self) -> None:
        self.asked_by[threading.current_thread().name] += 1


def _checksum(host: HostTier, block_hash: BlockHash, slot: int) -> int:
    from shared_cache.checksum import block_checksum

    return block_checksum(block_hash, host.buffer(slot))
