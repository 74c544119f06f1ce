"""What the router believes of all caches: fed by events that may come late or never.

One integer for each block and tier, a bit for each replica, as few bytes and operations as an index
of many replicas can have in Python.
"""

import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from actors.routing import Match
from actors.routing.policies import Knowledge
from benchmarks.routing.hardware import TOKENS_PER_BLOCK


@dataclass(frozen=True, slots=True)
class EventFaults:
    """How late events of caches are, and which part of their batches is lost and never repaired."""

    delay_s: float = 0.0
    lost_share: float = 0.0


class TierIndex:
    """Which replicas have which blocks of one tier."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}

    def add(self, bit: int, blocks: Iterable[int]) -> None:
        """The replica has these."""
        holders = self._holders
        for block in blocks:
            holders[block] = holders.get(block, 0) | bit

    def remove(self, bit: int, blocks: Iterable[int]) -> None:
        """The replica has these no more."""
        holders = self._holders
        for block in blocks:
            left = holders.get(block, 0) & ~bit
            if left:
                holders[block] = left
            else:
                holders.pop(block, None)

    def drop(self, bit: int) -> None:
        """The replica has nothing."""
        self.remove(bit, [block for block, bits in self._holders.items() if bits & bit])

    def depths(self, blocks: Sequence[int]) -> list[tuple[int, int]]:
        """The depth of each replica that has the first block: pairs of bits and depth."""
        found = []
        bits = -1
        for index, block in enumerate(blocks):
            left = bits & self._holders.get(block, 0)
            if left != bits:
                if bits > 0 and index:
                    found.append((bits & ~left, index))
                if not left:
                    return found
                bits = left
        if bits > 0:
            found.append((bits, len(blocks)))
        return found


Batch = tuple[float, TierIndex, int, Sequence[int], Sequence[int]]


class Beliefs:
    """Device and host indexes of all replicas, as far as `knowledge` goes."""

    def __init__(
        self,
        knowledge: Knowledge,
        faults: EventFaults,
        draw: random.Random,
        tokens_per_block: int = TOKENS_PER_BLOCK,
    ) -> None:
        self.knowledge = knowledge
        self._block = tokens_per_block
        self.device, self.host = TierIndex(), TierIndex()
        self._faults = faults
        self._draw = draw
        self._late: deque[Batch] = deque()
        self._bits: dict[str, int] = {}
        self._names: list[str] = []

    def add_replica(self, replica_id: str) -> None:
        """A replica with empty caches."""
        if replica_id not in self._bits:
            self._bits[replica_id] = 1 << len(self._names)
            self._names.append(replica_id)

    def remove_replica(self, replica_id: str) -> None:
        """Whatever it had is gone with it."""
        bit = self._bits[replica_id]
        self._late = deque(batch for batch in self._late if batch[2] != bit)
        self.device.drop(bit)
        self.host.drop(bit)

    def booked(self, replica_id: str, blocks: Sequence[int]) -> None:
        """A prompt was sent there."""
        if self.knowledge in ("bookings", "routed"):
            self.device.add(self._bits[replica_id], blocks)

    def told(
        self,
        tier: TierIndex,
        replica_id: str,
        stored: Sequence[int],
        gone: Sequence[int],
        now_s: float,
    ) -> None:
        """A replica tells what its memory of this tier got and lost."""
        if self.knowledge in ("nothing", "routed") or not (stored or gone):
            return
        faults = self._faults
        if faults.lost_share and self._draw.random() < faults.lost_share:
            return
        bit = self._bits[replica_id]
        if faults.delay_s:
            self._late.append((now_s + faults.delay_s, tier, bit, stored, gone))
        else:
            tier.remove(bit, gone)
            tier.add(bit, stored)

    def matches(self, blocks: Sequence[int], now_s: float) -> dict[str, Match]:
        """What every replica is believed to have of a prompt."""
        if self.knowledge == "nothing":
            return {}
        self._hear(now_s)
        device = dict(self._by_replica(self.device.depths(blocks)))
        host = dict(self._by_replica(self.host.depths(blocks)))
        return {
            self._names[one]: Match(
                device.get(one, 0) * self._block,
                max(device.get(one, 0), host.get(one, 0)) * self._block,
            )
            for one in sorted({*device, *host})
        }

    def _hear(self, now_s: float) -> None:
        while self._late and self._late[0][0] <= now_s:
            _, tier, bit, stored, gone = self._late.popleft()
            tier.remove(bit, gone)
            tier.add(bit, stored)

    @staticmethod
    def _by_replica(depths: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """(number of the replica, depth) for each bit."""
        found = []
        for bits, depth in depths:
            while bits:
                low = bits & -bits
                found.append((low.bit_length() - 1, depth))
                bits ^= low
        return found
