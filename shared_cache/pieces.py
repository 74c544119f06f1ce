"""Pieces: a few blocks from a tier straight into slots of the host tier, by one process only.

The slots are claimed for their blocks before anything is read, so that another process of this
machine that wants the same blocks waits for ours instead of reading them once more. The other one
may hang or die all the same: it is waited for a bounded time, then we read them ourselves.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shared_cache.hashing import BlockHash, ReuseScope
from shared_cache.host.interface import HostLease, HostTier, NewRun
from shared_cache.pacing import BandwidthLimit
from shared_cache.tiers import Tier

BLOCKS_PER_PIECE = 8
"""Read by one store call; a few MB, where local disks and object stores reach their bandwidth."""

CLAIM_WAIT_S = 0.25
"""How long one question to the host tier waits for a block that another process brings."""

Arrived = Callable[[Tier, HostLease, NewRun, int], None]
"""Told of blocks that came from a tier: their lease, which stays ours, and the run's position."""


@dataclass(eq=False, slots=True)
class Piece:
    """The blocks of `chain` from `start` on, and what was brought of them: one job's own.

    `num_here` leading ones are in host memory, leased by `leases`; `read` are those that a tier
    delivered, `num_from_peers` those that other processes brought.
    """

    chain: tuple[BlockHash, ...]
    start: int
    scope: ReuseScope
    num_here: int = 0
    num_from_peers: int = 0
    leases: list[HostLease] = field(default_factory=list)
    read: set[BlockHash] = field(default_factory=set)

    @property
    def hashes(self) -> tuple[BlockHash, ...]:
        """All blocks of this piece."""
        return self.chain[self.start :]

    @property
    def missing(self) -> tuple[BlockHash, ...]:
        """The blocks that are not here yet."""
        return self.chain[self.start + self.num_here :]

    def hold(self, lease: HostLease) -> None:
        """Take over a lease on the next blocks."""
        self.leases.append(lease)
        self.num_here += len(lease.slots)
        self.num_from_peers += lease.num_from_peers


class PieceReader:
    """Brings pieces into the host tier; used by the threads of all tiers.

    A block that another process claimed and did not bring for `patience_s` is read here too.
    `on_arrival` is told of what came, in the thread that read it.
    """

    def __init__(
        self,
        host: HostTier,
        limit: BandwidthLimit,
        patience_s: float,
        on_arrival: Arrived,
    ) -> None:
        self._host = host
        self._limit = limit
        self._patience_s = patience_s
        self._on_arrival = on_arrival
        self._closed = threading.Event()

    def close(self) -> None:
        """Let jobs that wait for somebody end."""
        self._closed.set()

    def read(self, piece: Piece, tier: Tier) -> bool:
        """Bring what is missing of `piece`; True when `tier` did not give all that it was asked.

        Fewer blocks may be here afterwards for another reason: there is no room for them.
        """
        while slots := self._slots_in_turn(piece):
            end = piece.num_here + len(slots)
            if self._fill(piece, tier, slots) < len(slots):
                return True
            if piece.num_here < end:  # read, but the host tier did not take it
                break
        return False

    def _slots_in_turn(self, piece: Piece) -> tuple[int, ...]:
        """As `_slots`, once the bandwidth allows it: who waits for that has claimed nothing."""
        block_bytes = self._host.block_bytes
        num_booked, num_claimed = len(piece.missing), 0
        self._closed.wait(self._limit.delay_s(num_booked * block_bytes))
        try:
            slots = self._slots(piece)
            num_claimed = len(slots)
        finally:
            self._limit.give_back((num_booked - num_claimed) * block_bytes)
        return slots

    def _slots(self, piece: Piece) -> tuple[int, ...]:
        """Room for the next missing blocks, when nobody else brings them; none when all are here.

        Takes what is here or comes meanwhile. None too when there is no room.
        """
        since_s = time.monotonic()
        while piece.missing and not self._closed.is_set():
            claim = self._host.claim(piece.missing, CLAIM_WAIT_S)
            piece.hold(claim.lease)
            if claim.slots or not claim.is_coming:
                return claim.slots
            if claim.lease.slots:
                since_s = time.monotonic()
            elif time.monotonic() - since_s >= self._patience_s:
                return self._host.reserve(len(piece.missing))
        return ()

    def _fill(self, piece: Piece, tier: Tier, slots: Sequence[int]) -> int:
        """Read blocks into `slots` and publish the good ones; how many of them are good."""
        num_good = 0
        try:
            buffers = [self._host.buffer(slot) for slot in slots]
            checksums = tier.read_into(piece.missing[: len(slots)], buffers)
            if checksums:
                self._publish(piece, tier, slots[: len(checksums)], checksums)
            num_good = len(checksums)
        finally:
            if num_good < len(slots):
                self._host.cancel(slots[num_good:])
        return num_good

    def _publish(
        self, piece: Piece, tier: Tier, slots: Sequence[int], checksums: tuple[int, ...]
    ) -> None:
        position = piece.start + piece.num_here
        run = NewRun(
            parent=piece.scope.parent_of(piece.chain, position),
            hashes=piece.missing[: len(slots)],
            tenant=piece.scope.tenant,
            is_stored=tier.is_shared,
            checksums=checksums,
        )
        lease = self._host.commit(slots, run)
        piece.read.update(run.hashes[: len(lease.slots)])
        piece.hold(lease)
        self._on_arrival(tier, lease, run, position)
