"""Sinks: the tiers that are written to, each behind a queue and a rule of what is worth it."""

import threading
from collections.abc import Iterator, Sequence

from shared_cache.cost import CostGate
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import HostLease, HostTier, NewRun
from shared_cache.saving import Answer, SaveQueue
from shared_cache.tiers import Tier, TieredStore, TierStats

NEAR_QUEUE_SHARE = 0.25
"""Part of all blocks that may wait to be written, for each tier nearer than the shared one."""


class Sink:
    """One tier that is written to; thread-safe, waits for nothing."""

    def __init__(self, host: HostTier, tier: Tier, queue: SaveQueue, gate: CostGate | None) -> None:
        self.tier = tier
        self.queue = queue
        self._host = host
        self._gate = gate
        self._lock = threading.Lock()
        self._num_declined = 0

    def offer(self, run: NewRun, first: int) -> None:
        """Queue leased blocks, if they are worth it; `first` is the run's place in its prompt.

        Takes a lease of its own, so these blocks must be leased by this process now.
        """
        if run.hashes and self.wants(first, first + len(run.hashes)):
            self.put(self._host.lease_held(run.hashes), run)

    def put(self, lease: HostLease, run: NewRun) -> None:
        """Take over `lease`, which covers leading blocks of `run`, and queue those."""
        self.queue.put(lease, run.parent, run.hashes[: len(lease.slots)], run.tenant)

    def wants(self, start: int, stop: int) -> bool:
        """Whether blocks `[start, stop)` of a prompt are worth writing; counts those that are not.

        Always, unless the tier's admission is `worth`.
        """
        if self.tier.admission != "worth" or self._gate is None:
            return True
        is_worth = self._gate.worth(self.tier.url, start, stop)
        with self._lock:
            self._num_declined += 0 if is_worth else stop - start
        return is_worth

    def stats(self) -> TierStats:
        """The tier's counters."""
        counts = self.queue.counts
        return self.tier.stats(counts.saved, counts.dropped, self._num_declined)


def make_sinks(
    host: HostTier,
    tiers: TieredStore,
    max_blocks: int,
    num_threads: int,
    gate: CostGate | None,
    answer: Answer,
) -> Iterator[Sink]:
    """A sink for each tier that may be written; their queues hold `max_blocks` at most together.

    `answer` is told what became of blocks on their way to the shared tier.
    """
    near = [tier for tier in tiers.tiers if tier.may_write and not tier.is_shared]
    near_blocks = max(1, int(max_blocks * NEAR_QUEUE_SHARE))
    for tier in near:
        yield Sink(host, tier, SaveQueue(host, tier, near_blocks, num_threads), gate)
    if tiers.shared is not None and tiers.shared.may_write:
        room = max(1, max_blocks - len(near) * near_blocks) if max_blocks else 0
        queue = SaveQueue(host, tiers.shared, room, num_threads, answer)
        yield Sink(host, tiers.shared, queue, gate)


def consecutive(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The ranges `[begin, end)` of consecutive positions, in order."""
    begin = end = -1
    for position in sorted(positions):
        if position != end:
            if end > begin:
                yield begin, end
            begin = position
        end = position + 1
    if end > begin:
        yield begin, end


def part(run: NewRun, begin: int, end: int) -> NewRun:
    """Blocks `[begin, end)` of a run, for writing them to a tier."""
    parent: BlockHash = run.hashes[begin - 1] if begin else run.parent
    return NewRun(parent, run.hashes[begin:end], run.tenant)
