"""Publishing: what becomes of new blocks once the engine's step has copied them.

Committing a run takes its checksums and, where the host tier is shared by the processes of a node,
a question to its owner; both are too slow for the step. Here one thread does it, and hands what
nobody has stored yet to the queues that write. It also answers for blocks that a look-up found to
be missing in the shared tier (used a second time, or dropped by somebody under pressure).
"""

import threading
import time
from collections.abc import Sequence
from functools import partial

from shared_cache.cost import CostGate
from shared_cache.fates import Fates
from shared_cache.faults import FaultLog
from shared_cache.hashing import BlockHash
from shared_cache.host.interface import HostLease, HostTier, NewRun
from shared_cache.publish_jobs import Duty, PublishJobs, Written
from shared_cache.saving import SaveCounts
from shared_cache.sinks import consecutive, make_sinks, part
from shared_cache.tiers import Tier, TieredStore, TierStats

NEAR_FLUSH_S = 1.0
"""How long a flush waits for tiers whose blocks can be had from the shared tier too."""

DECLINE_INTERVAL_S = 60.0
"""How often a process that may not write to the shared tier gives back the duty to do so."""


class Publisher:
    """Publishes what was written into host slots, and has it stored; for any number of threads.

    Blocks that were not published, or not written to the shared tier, are counted as dropped.
    """

    def __init__(
        self,
        host: HostTier,
        tiers: TieredStore,
        max_blocks: int,
        num_threads: int,
        faults: FaultLog,
        gate: CostGate | None = None,
        fates: Fates | None = None,
    ) -> None:
        """At most `max_blocks` wait to be written, and as many to be handed to the queues."""
        self._host = host
        self._fates = fates or Fates()
        self._tiers = tiers
        self._faults = faults
        self._sinks = {
            sink.tier: sink
            for sink in make_sinks(host, tiers, max_blocks, num_threads, gate, self._answer)
        }
        self._shared = None if tiers.shared is None else self._sinks.get(tiers.shared)
        self._jobs = PublishJobs(max_blocks)
        self._declined: list[BlockHash] = []  # this and the next: the thread's own
        self._next_decline_s = float("-inf")
        self._thread = threading.Thread(target=self._work, name="kvcommons-publish", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> SaveCounts:
        """What became of new blocks, as far as the shared tier is concerned."""
        saved = self._shared.queue.counts if self._shared else SaveCounts(0, 0, 0)
        counts = self._jobs.counts
        pending = counts.unpublished if self._shared else 0
        return SaveCounts(saved.saved, saved.dropped + counts.dropped, saved.pending + pending)

    def reserve(self, num_blocks: int) -> tuple[int, ...]:
        """Slots for up to so many blocks, to be published or given back; never waits.

        Blocks for which there is no slot are dropped.
        """
        slots = self._host.reserve(num_blocks)
        self._jobs.expect(len(slots))
        self.lose(num_blocks - len(slots))
        return slots

    def give_back(self, slots: Sequence[int]) -> None:
        """Slots of `reserve` that nobody writes to any more; their blocks are dropped."""
        self._jobs.expect(-len(slots))
        self._host.cancel(slots)
        self.lose(len(slots))

    def lose(self, num_blocks: int) -> None:
        """Blocks that could not even be copied are dropped."""
        self._jobs.drop(num_blocks)

    def publish(self, slots: Sequence[int], run: NewRun, first: int) -> None:
        """Take over slots of `reserve`, written now; returns at once: *in the step*."""
        if not self._jobs.put(Written(tuple(slots), run, first)):
            self._host.cancel(slots)

    def owe(self, lease: HostLease, run: NewRun, first: int) -> None:
        """Have the blocks that `lease.to_store` names written; `lease` stays the caller's.

        Returns at once. Under pressure they are declined: a later look-up will name them again.
        """
        for begin, end in consecutive(lease.to_store):
            owed = part(run, begin, end)
            hold = partial(self._host.lease_held, owed.hashes) if self._shared else None
            if not self._jobs.put_duty(owed, first + begin, hold):
                return

    def promote(self, tier: Tier, lease: HostLease, run: NewRun, first: int) -> None:
        """Blocks came from `tier`: offer them to the nearer ones; `lease` stays the caller's."""
        for nearer in self._tiers.before(tier):
            sink = self._sinks.get(nearer)
            if sink is not None:
                sink.offer(part(run, 0, len(lease.slots)), first)
        if lease.to_store:
            self.owe(lease, run, first)

    def await_published(self, timeout_s: float) -> bool:
        """Wait until all is in the host tier and handed to the queues; False when time ran out.

        Blocks that are still being copied off the device are waited for too.
        """
        return self._jobs.await_none(timeout_s)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is published and in the shared tier, or dropped; False: out of time."""
        deadline_s = time.monotonic() + timeout_s
        if not self.await_published(timeout_s):
            return False
        left_s = max(0.0, deadline_s - time.monotonic())
        is_stored = self._shared is None or self._shared.queue.flush(left_s)
        for sink in self._sinks.values():
            if sink is not self._shared:
                sink.queue.flush(min(NEAR_FLUSH_S, max(0.0, deadline_s - time.monotonic())))
        return is_stored

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that run still; they use the slots of what they publish or write."""
        writing = [thread for sink in self._sinks.values() for thread in sink.queue.threads]
        return [*writing, self._thread] if self._thread.is_alive() else writing

    def close(self) -> None:
        """Drop what is not published or written yet; waits for nothing."""
        for job in self._jobs.close():
            self._drop(job)
            self._jobs.done(job)
        for sink in self._sinks.values():
            sink.queue.stop()

    def tier_stats(self) -> tuple[TierStats, ...]:
        """The counters of every tier."""
        return tuple(
            self._sinks[tier].stats() if tier in self._sinks else tier.stats()
            for tier in self._tiers.tiers
        )

    def _work(self) -> None:
        while (job := self._jobs.next()) is not None:
            try:
                with self._faults.caught("publishing new blocks"):
                    self._handle(job)
            finally:
                self._jobs.done(job)

    def _handle(self, job: Written | Duty) -> None:
        if isinstance(job, Written):
            self._commit(job)
        elif job.lease is None:
            self._decline(job.run.hashes)
        else:
            self._store(job.lease, job.run, job.first)

    def _commit(self, job: Written) -> None:
        try:
            lease = self._host.commit(job.slots, job.run)
        except BaseException:
            self._drop(job)  # a commit that fails has published nothing
            raise
        try:
            num_lost = len(job.slots) - len(lease.slots)
            self._fates.note(job.run.hashes[: len(lease.slots)], "published")
            self._jobs.drop(num_lost)
            self._offer_to_near(lease, job)
            for begin, end in consecutive(lease.to_store):
                held = self._host.lease_held(job.run.hashes[begin:end])
                self._store(held, part(job.run, begin, end), job.first + begin)
        finally:
            self._host.release(lease)

    def _offer_to_near(self, lease: HostLease, job: Written) -> None:
        """Tiers nearer than the shared one get what is new on this node, stored or not."""
        new = tuple(i for i, slot in enumerate(lease.slots) if slot == job.slots[i])
        for sink in self._sinks.values():
            if not sink.tier.is_shared and sink.tier.admission != "second_use":
                for begin, end in consecutive(new):
                    sink.offer(part(job.run, begin, end), job.first + begin)

    def _store(self, lease: HostLease, run: NewRun, first: int) -> None:
        """Write leased blocks to the shared tier, or decline it; takes over `lease`."""
        sink, num_blocks = self._shared, len(lease.slots)
        if sink is None or not num_blocks or not sink.wants(first, first + num_blocks):
            self._host.release(lease)
            self._decline(run.hashes)
            return
        sink.put(lease, run)
        if num_blocks < len(run.hashes):
            self._answer(run.hashes[num_blocks:], is_stored=False)

    def _decline(self, hashes: Sequence[BlockHash]) -> None:
        """Give duties back. Who may write nothing does so seldom: it would be named them at once.

        Other processes of this machine may be able to write, so they are not kept for ever.
        """
        self._declined += hashes
        if self._shared is None and time.monotonic() < self._next_decline_s:
            return
        self._next_decline_s = time.monotonic() + DECLINE_INTERVAL_S
        declined, self._declined = self._declined, []
        self._answer(tuple(declined), is_stored=False)

    def _answer(self, hashes: Sequence[BlockHash], is_stored: bool) -> None:
        """Tell the host tier what became of blocks, and remember it."""
        self._fates.note(hashes, "stored" if is_stored else "dropped")
        self._host.stored(hashes, is_stored)

    def _drop(self, job: Written | Duty) -> None:
        if isinstance(job, Written):
            self._host.cancel(job.slots)
            self._fates.note(job.run.hashes, "dropped")
            self._jobs.drop(len(job.slots))
        elif job.lease is not None:
            self._host.release(job.lease)
